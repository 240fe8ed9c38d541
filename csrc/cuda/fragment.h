// Fragments of matrices that are in shared memory.
#pragma once

#include "device.h"

namespace t2v::cuda {

#ifdef T2V_EMULATED

template <class Fragment, class T>
void load_shared(Fragment& fragment, const T* from, int pitch) {
  nvcuda::wmma::load_matrix_sync(fragment, from, pitch);
}

template <class Fragment>
void store_shared(float* to, const Fragment& fragment, int pitch) {
  nvcuda::wmma::store_matrix_sync(to, fragment, pitch, nvcuda::wmma::mem_row_major);
}

#else

// nvcuda::wmma::load_matrix_sync for a matrix in shared memory. Its own loads of bfloat16 and TF32 are generic: they
// find out at run time which memory an address is in, read 4 bytes at a time, and transpose afterwards.
template <class Fragment>
__device__ inline void load_shared(Fragment& fragment, const __half* from, int pitch) {
  nvcuda::wmma::load_matrix_sync(fragment, from, pitch);
}

#define T2V_LOAD_SHARED(USE, MATRIX, LAYOUT, ORDER, DEPTH, ELEMENT, STORED, NAME)                        \
  __device__ inline void load_shared(                                                                    \
      nvcuda::wmma::fragment<nvcuda::wmma::USE, 16, 16, DEPTH, ELEMENT, nvcuda::wmma::LAYOUT>& fragment, \
      const STORED* from, int pitch) {                                                                   \
    static_assert(sizeof(fragment.x) == 16);                                                             \
    unsigned* const to = reinterpret_cast<unsigned*>(fragment.x);                                        \
    asm volatile("wmma.load." MATRIX ".sync.aligned." ORDER ".m16n16k" #DEPTH ".shared." NAME            \
                 " {%0, %1, %2, %3}, [%4], %5;\n"                                                        \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])                                    \
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))), "r"(pitch)                \
                 : "memory");                                                                            \
  }
#define T2V_FOR_EACH_MATRIX(DEPTH, ELEMENT, STORED, NAME)                        \
  T2V_LOAD_SHARED(matrix_a, "a", row_major, "row", DEPTH, ELEMENT, STORED, NAME) \
  T2V_LOAD_SHARED(matrix_a, "a", col_major, "col", DEPTH, ELEMENT, STORED, NAME) \
  T2V_LOAD_SHARED(matrix_b, "b", row_major, "row", DEPTH, ELEMENT, STORED, NAME) \
  T2V_LOAD_SHARED(matrix_b, "b", col_major, "col", DEPTH, ELEMENT, STORED, NAME)

T2V_FOR_EACH_MATRIX(16, __nv_bfloat16, __nv_bfloat16, "bf16")
T2V_FOR_EACH_MATRIX(8, nvcuda::wmma::precision::tf32, float, "tf32")
#undef T2V_FOR_EACH_MATRIX
#undef T2V_LOAD_SHARED

// nvcuda::wmma::store_matrix_sync by rows, to shared memory. The stores of TF32's sums are generic otherwise.
#define T2V_STORE_SHARED(DEPTH)                                                                                      \
  __device__ inline void store_shared(                                                                               \
      float* to, const nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, DEPTH, float>& f, int pitch) {      \
    asm volatile(                                                                                                    \
        "wmma.store.d.sync.aligned.row.m16n16k" #DEPTH                                                               \
        ".shared.f32"                                                                                                \
        " [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), \
        "f"(f.x[0]), "f"(f.x[1]), "f"(f.x[2]), "f"(f.x[3]), "f"(f.x[4]), "f"(f.x[5]), "f"(f.x[6]), "f"(f.x[7]),      \
        "r"(pitch)                                                                                                   \
        : "memory");                                                                                                 \
  }
T2V_STORE_SHARED(16)
T2V_STORE_SHARED(8)
#undef T2V_STORE_SHARED

#endif

}  // namespace t2v::cuda
