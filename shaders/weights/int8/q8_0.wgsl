// The 16 columns of half a q8_0 block, 4 in a word: q + 128 with its highest bit turned over is q.
fn int8x16(block: Block, half: u32) -> vec4<u32> {
    return select(block.low, block.high, half == 1u) ^ vec4(0x80808080u);
}
