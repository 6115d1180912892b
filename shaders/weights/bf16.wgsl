// bf16 weights: two elements in a word, the first in its low half; each is the upper half of an f32.
@group(0) @binding(2) var<storage, read> weights: array<vec2<u32>>; // [rows, width4]

fn weight4(row: u32, col4: u32) -> vec4<f32> {
    let words = weights[row * shape.width4 + col4];
    let low = words << vec2(16u);
    let high = words & vec2(0xffff0000u);
    return bitcast<vec4<f32>>(vec4(low.x, high.x, low.y, high.y));
}
