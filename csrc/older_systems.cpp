// The C and the C++ library of the machine that runs this code can be older than those of the compiler. These are the
// libraries' own definitions of what glibc has only from 2.32 on, and libstdc++ only from GCC 11 on.
#include <new>
#include <sstream>

#ifdef __GLIBC__
// Shared pointers read this variable. 0 says that there may be several threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
#ifdef __GLIBCXX__
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
template class basic_stringbuf<char>;
template class basic_ostringstream<char>;
template class basic_stringstream<char>;
}  // namespace std
#endif
