// The 16 columns of half a q4_0 block, 4 in a word: 8 is taken from every byte, whose highest bit stops the borrow and is turned back.
fn int8x16(block: Block, half: u32) -> vec4<u32> {
    let numbers = (block.quants >> vec4(4u * half)) & vec4(0x0f0f0f0fu);
    return ((numbers | vec4(0x80808080u)) - vec4(0x08080808u)) ^ vec4(0x80808080u);
}
