// All kernels in one library, callable by name.
#include "attention.cu"
#undef THREADS
#undef ROWS
#include "attention_any.cu"
