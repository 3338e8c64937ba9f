// The row kernels exist once per instruction set, in namespaces of these names (see last_batch_rows.cpp).
#pragma once

namespace dlb_fast {

enum class Isa { portable, avx2, avx512 };
Isa detected_isa();
const char* instruction_set();

}  // namespace dlb_fast
