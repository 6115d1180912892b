// The end of a linear layer: outputs are stored, or added to what is there.
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [rows, stride]

// Outputs 2 pair and 2 pair + 1 of a row.
fn finish(row: u32, pair: u32, sums: vec2<f32>) {
    store(row, 2u * pair, sums.x);
    store(row, 2u * pair + 1u, sums.y);
}

fn store(row: u32, out: u32, sum: f32) {
    if (out >= shape.out) {
        return;
    }
    let at = row * shape.stride + shape.first_out + out;
    if (shape.accumulate == 1u) {
        y[at] += sum;
    } else {
        y[at] = sum;
    }
}
