"""The library behind the interfaces of other code: one file a frontend."""
