// The end of two linear layers, whose outputs alternate: y = silu(gate) * up.
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [rows, stride]

fn finish(row: u32, pair: u32, sums: vec2<f32>) {
    if (2u * pair >= shape.out) {
        return;
    }
    let gate = sums.x;
    // Never exp of something positive: it may overflow, and infinities are not to be relied on.
    let e = exp(-abs(gate));
    let sigmoid = select(e, 1.0, gate >= 0.0) / (1.0 + e);
    y[row * shape.stride + shape.first_out + pair] = gate * sigmoid * sums.y;
}
