// The kernels of this instruction set, as the rest of the library calls them.
static constexpr Isa kTable = {
    PHX_NAME, matmul_float, matmul_bf16, matmul_compact, expand_units,
    pack_panel, quantize, matmul_int8, rms_norm, layer_norm, activate,
    rope, convert, add_parts, add_scaled, squares, attention_scratch, attention, argmax, flaw,
};
