// Weights lie in tiles of 16 rows, a tile in blocks of 32 columns. Of a block every row has some vectors of 16 bytes, vector v of all
// rows before vector v + 1; quantised ones have behind them what the rows' values have of further bits, a word or two a row, and the rows'
// scales: f16, two in a word, or bytes. Behind a tile's last block is what its blocks share by eights, as the whole matrix counts them.
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;

const VECTORS: u32 = 8u; // of 4 columns in a block

// Vectors in a tile.
fn tile_stride() -> u32 {
    return shape.blocks * STRIDE + (shape.phase + shape.blocks + 7u) / 8u * SHARED;
}

// The vector at which begins what block b of a tile shares.
fn shared_at(tile: u32, b: u32) -> u32 {
    return tile * tile_stride() + shape.blocks * STRIDE + (shape.phase + b) / 8u * SHARED;
}

fn dot_add(a: vec4<f32>, b: vec4<f32>, c: f32) -> f32 {
    return fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, c))));
}

// The f16 of a row, from the vector at which those of all rows begin.
fn scale_at(at: u32, row: u32) -> f32 {
    let words = weights[at + row / 8u];
    let pair = unpack2x16float(words[row / 2u % 4u]);
    return select(pair.x, pair.y, row % 2u == 1u);
}

// The byte of a row, from the vector of all rows' bytes.
fn byte_at(at: u32, row: u32) -> f32 {
    return f32((weights[at][row / 4u] >> (8u * (row % 4u))) & 0xffu);
}

// The word of a row, from the vector at which those of all rows begin.
fn word_at(at: u32, row: u32) -> u32 {
    return weights[at + row / 4u][row % 4u];
}

// The 4-bit values of columns 4j to 4j + 4, a byte each: the low halves are of the first 16 columns, the high ones of the others.
fn nibbles(quants: vec4<u32>, j: u32) -> u32 {
    return (quants[j % 4u] >> (j / 4u * 4u)) & 0x0f0f0f0fu;
}
