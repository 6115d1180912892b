// y = x weight^T for many rows: 64 invocations compute a tile of 32 rows x 32 outputs, 4 x 4 each.
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;  // [rows, width4]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;  // [rows, stride]

const TILE: u32 = 32u;
const DEPTH: u32 = 4u; // vectors of 4 columns in a step

var<workgroup> tile_x: array<vec4<f32>, TILE * DEPTH>; // [DEPTH, rows of the tile]
var<workgroup> tile_w: array<vec4<f32>, TILE * DEPTH>; // [DEPTH, outputs of the tile]

fn store(row: u32, first: u32, sums: vec4<f32>) {
    if (row >= row_count()) {
        return;
    }
    for (var j = 0u; j < 4u; j++) {
        let out = first + 8u * j;
        if (out < shape.out) {
            let at = row * shape.stride + shape.first_out + out;
            var sum = sums[j];
            if (shape.accumulate == 1u) {
                sum += y[at];
            }
            y[at] = sum;
        }
    }
}

@compute @workgroup_size(64)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let index = folded(group, groups);
    let down = (row_count() + TILE - 1u) / TILE;
    let first_row = index % down * TILE;
    let first_out = index / down * TILE;
    if (first_out >= shape.out) {
        return;
    }
    let out = lane % 8u;
    let row = lane / 8u;
    // Row row + 8 i of the tile, outputs out + 8 j.
    var sums0 = vec4(0.0);
    var sums1 = vec4(0.0);
    var sums2 = vec4(0.0);
    var sums3 = vec4(0.0);
    for (var col4 = 0u; col4 < shape.width4; col4 += DEPTH) {
        for (var i = lane; i < TILE * DEPTH; i += 64u) {
            let depth = i % DEPTH;
            let line = i / DEPTH;
            let col = col4 + depth;
            var vx = vec4(0.0);
            var vw = vec4(0.0);
            if (col < shape.width4) {
                if (first_row + line < row_count()) {
                    vx = x[(first_row + line) * shape.width4 + col];
                }
                if (first_out + line < shape.out) {
                    vw = weight4(first_out + line, col);
                }
            }
            tile_x[depth * TILE + line] = vx;
            tile_w[depth * TILE + line] = vw;
        }
        workgroupBarrier();
        for (var depth = 0u; depth < DEPTH; depth++) {
            let at_w = depth * TILE + out;
            let w0 = tile_w[at_w];
            let w1 = tile_w[at_w + 8u];
            let w2 = tile_w[at_w + 16u];
            let w3 = tile_w[at_w + 24u];
            let at_x = depth * TILE + row;
            let x0 = tile_x[at_x];
            let x1 = tile_x[at_x + 8u];
            let x2 = tile_x[at_x + 16u];
            let x3 = tile_x[at_x + 24u];
            sums0 += vec4(dot(x0, w0), dot(x0, w1), dot(x0, w2), dot(x0, w3));
            sums1 += vec4(dot(x1, w0), dot(x1, w1), dot(x1, w2), dot(x1, w3));
            sums2 += vec4(dot(x2, w0), dot(x2, w1), dot(x2, w2), dot(x2, w3));
            sums3 += vec4(dot(x3, w0), dot(x3, w1), dot(x3, w2), dot(x3, w3));
        }
        workgroupBarrier();
    }
    store(first_row + row, first_out + out, sums0);
    store(first_row + row + 8u, first_out + out, sums1);
    store(first_row + row + 16u, first_out + out, sums2);
    store(first_row + row + 24u, first_out + out, sums3);
}
