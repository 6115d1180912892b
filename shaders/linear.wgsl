// y = x weight^T for one or a few rows: a workgroup computes TILES tiles of 16 outputs for ROWS rows.
//
// A lane has one of the 16 outputs of every tile. Lanes beyond the first 16 share the columns: of SLICES slices, each takes every
// SLICES-th block of 32.
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>; // [rows, width4]

const LANES: u32 = 16u * SLICES;

var<workgroup> partial: array<f32, ROWS * TILES * LANES>; // [rows, tiles, slices, 16]

@compute @workgroup_size(LANES)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    prepare(lane, LANES);
    let out = lane % 16u;
    let slice = lane / 16u;
    // Rows vary fastest, so that neighbours in time read the same weights.
    let index = folded(group, groups);
    let down = (row_count() + ROWS - 1u) / ROWS;
    let first_row = index % down * ROWS;
    let first_tile = index / down * TILES;
    let tiles = (shape.out + 15u) / 16u;
    if (first_tile >= tiles) {
        return;
    }
    var at: array<u32, TILES>;
    // Where fewer tiles or rows are left, the last is computed again and not stored.
    for (var t = 0u; t < TILES; t++) {
        at[t] = min(first_tile + t, tiles - 1u) * tile_stride() + slice * STRIDE;
    }
    var start: array<u32, ROWS>;
    for (var i = 0u; i < ROWS; i++) {
        start[i] = min(first_row + i, row_count() - 1u) * shape.width4 + slice * 8u;
    }
    var sums: array<array<f32, ROWS>, TILES>;
    for (var b = slice; b < shape.blocks; b += SLICES) {
        var blocks: array<Block, TILES>;
        for (var t = 0u; t < TILES; t++) {
            blocks[t] = block_at(at[t], out, min(first_tile + t, tiles - 1u), b);
            at[t] += STRIDE * SLICES;
        }
        var totals: array<f32, ROWS>;
        var inner: array<array<f32, ROWS>, TILES>;
        for (var j = 0u; j < VECTORS; j++) {
            var w: array<vec4<f32>, TILES>;
            for (var t = 0u; t < TILES; t++) {
                w[t] = block4(blocks[t], j);
            }
            for (var i = 0u; i < ROWS; i++) {
                let v = x[start[i] + j];
                if (BIAS != 0.0 || ADDS) {
                    totals[i] += v.x + v.y + v.z + v.w;
                }
                for (var t = 0u; t < TILES; t++) {
                    inner[t][i] = dot_add(w[t], v, inner[t][i]);
                }
            }
        }
        for (var i = 0u; i < ROWS; i++) {
            start[i] += 8u * SLICES;
            for (var t = 0u; t < TILES; t++) {
                sums[t][i] = fma(blocks[t].scale, inner[t][i] - BIAS * totals[i], sums[t][i]);
                if (ADDS) {
                    sums[t][i] = fma(added(blocks[t]), totals[i], sums[t][i]);
                }
            }
        }
    }
    for (var i = 0u; i < ROWS; i++) {
        for (var t = 0u; t < TILES; t++) {
            partial[((i * TILES + t) * SLICES + slice) * 16u + out] = sums[t][i];
        }
    }
    workgroupBarrier();
    for (var p = lane; p < ROWS * TILES * 8u; p += LANES) {
        let row = p / (TILES * 8u);
        let pair = p % (TILES * 8u);
        var sum = vec2(0.0);
        for (var s = 0u; s < SLICES; s++) {
            let k = ((p / 8u) * SLICES + s) * 16u + 2u * (p % 8u);
            sum += vec2(partial[k], partial[k + 1u]);
        }
        if (first_row + row < row_count()) {
            finish(first_row + row, first_tile * 8u + pair, sum);
        }
    }
}
