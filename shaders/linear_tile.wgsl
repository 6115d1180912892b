// y = x weight^T for many rows: SIDE x SIDE invocations compute a tile of M rows x N outputs each.
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>; // [rows, width4]

const LANES: u32 = SIDE * SIDE;
const DOWN: u32 = SIDE * M;
const ACROSS: u32 = SIDE * N;

var<workgroup> tile_x: array<vec4<f32>, 8u * DOWN>;   // [8, rows of the tile]
var<workgroup> tile_w: array<vec4<f32>, 8u * ACROSS>; // [8, outputs of the tile]

@compute @workgroup_size(LANES)
fn main(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    prepare(lane, LANES);
    let index = folded(group, groups);
    let down = (row_count() + DOWN - 1u) / DOWN;
    let first_row = index % down * DOWN;
    let first_out = index / down * ACROSS;
    if (first_out >= shape.out) {
        return;
    }
    let across = lane % SIDE;
    let row = lane / SIDE;
    // Rows row + SIDE i of the tile, outputs 2 across + j % 2 + 2 SIDE (j / 2): pairs of neighbours.
    var sums: array<array<f32, N>, M>;
    for (var b = 0u; b < shape.blocks; b++) {
        for (var o = lane; o < ACROSS; o += LANES) {
            let out = min(first_out + o, shape.out - 1u);
            let block = block_at(out / 16u * tile_stride() + b * STRIDE, out % 16u, out / 16u, b);
            for (var j = 0u; j < VECTORS; j++) {
                tile_w[j * ACROSS + o] = (block4(block, j) - BIAS) * block.scale + added(block);
            }
        }
        for (var o = lane; o < 8u * DOWN; o += LANES) {
            let of_row = min(first_row + o / 8u, row_count() - 1u);
            tile_x[o % 8u * DOWN + o / 8u] = x[of_row * shape.width4 + 8u * b + o % 8u];
        }
        workgroupBarrier();
        for (var d = 0u; d < 8u; d += 1u) {
            var w: array<vec4<f32>, N>;
            for (var j = 0u; j < N; j++) {
                w[j] = tile_w[d * ACROSS + 2u * across + j % 2u + 2u * SIDE * (j / 2u)];
            }
            for (var i = 0u; i < M; i++) {
                let v = tile_x[d * DOWN + row + SIDE * i];
                for (var k = 0u; k < N; k++) {
                    sums[i][k] = dot_add(v, w[k], sums[i][k]);
                }
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < M; i++) {
        let of_row = first_row + row + SIDE * i;
        if (of_row < row_count()) {
            for (var h = 0u; h < HALF_N; h++) {
                finish(of_row, first_out / 2u + across + SIDE * h, vec2(sums[i][2u * h], sums[i][2u * h + 1u]));
            }
        }
    }
}
