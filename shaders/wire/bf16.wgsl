// bf16, the upper half of an f32, two in a word; rounded to the nearest, ties to even.
fn narrow4(v: vec4<f32>) -> vec2<u32> {
    let bits = bitcast<vec4<u32>>(v);
    let rounded = bits + 0x7fffu + ((bits >> vec4(16u)) & vec4(1u));
    return (rounded.xz >> vec2(16u)) | (rounded.yw & vec2(0xffff0000u));
}

fn widen4(words: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
}
