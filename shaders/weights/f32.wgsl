// f32 weights: a vector is four elements.
@group(0) @binding(2) var<storage, read> weights: array<vec4<f32>>; // [rows, width4]

fn weight4(row: u32, col4: u32) -> vec4<f32> {
    return weights[row * shape.width4 + col4];
}
