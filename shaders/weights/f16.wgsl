// f16 weights: two elements in a word, the first in its low half.
@group(0) @binding(2) var<storage, read> weights: array<vec2<u32>>; // [rows, width4]

fn weight4(row: u32, col4: u32) -> vec4<f32> {
    let words = weights[row * shape.width4 + col4];
    return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
}
