// Weights lie in tiles of 16 rows, a tile in blocks of 32 columns. Of a block every row has some vectors of 16 bytes, vector v of all
// rows before vector v + 1; quantised ones have the rows' f16 scales behind them, two in a word.
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;

const VECTORS: u32 = 8u; // of 4 columns in a block

fn dot_add(a: vec4<f32>, b: vec4<f32>, c: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, c))));
}

// The scale of a row, from the vector at which its block's scales begin.
fn scale_at(at: u32, row: u32) -> f32 {
    let words = weights[at + row / 8u];
    let pair = unpack2x16float(words[row / 2u % 4u]);
    return select(pair.x, pair.y, row % 2u == 1u);
}
