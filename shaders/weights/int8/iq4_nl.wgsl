// The 16 columns of half an iq4_nl block, 4 in a word: its levels are int8 values.
fn int8x16(block: Block, half: u32) -> vec4<u32> {
    return vec4(level4(block, 4u * half), level4(block, 4u * half + 1u), level4(block, 4u * half + 2u), level4(block, 4u * half + 3u));
}

fn level4(block: Block, j: u32) -> u32 {
    return pack4xI8(vec4<i32>(block4(block, j)));
}
