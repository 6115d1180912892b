// y = x weight^T for many rows, as linear_tile.wgsl computes it, of int8 activations and weights in int8: products of 4 packed pairs are
// added as integers within a block of 32 columns, exactly, and blocks in f32 with both scales.
//
// naga makes of `dot4I8Packed` an OpSDot where the Vulkan device has the feature shaderIntegerDotProduct (all of 1.3 do, in hardware or
// not), dot4add_i8packed from shader model 6.4 on, and four products of bytes for Metal and GL.
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>; // [rows, blocks, 3], of quantise.wgsl

const LANES: u32 = SIDE * SIDE;
const DOWN: u32 = SIDE * M;
const ACROSS: u32 = SIDE * N;
const DEPTH: u32 = 2u; // blocks of columns between barriers

var<workgroup> tile_x: array<vec4<u32>, DEPTH * 2u * DOWN>;   // [blocks, halves of a block, rows of the tile]
var<workgroup> tile_w: array<vec4<u32>, DEPTH * 2u * ACROSS>; // [blocks, halves of a block, outputs of the tile]
var<workgroup> scales_x: array<f32, DEPTH * DOWN>;
var<workgroup> scales_w: array<f32, DEPTH * ACROSS>;

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
    // Rows and outputs as in linear_tile.wgsl.
    var sums: array<array<f32, N>, M>;
    for (var b = 0u; b < shape.blocks; b += DEPTH) {
        let depth = min(DEPTH, shape.blocks - b);
        for (var o = lane; o < depth * ACROSS; o += LANES) {
            let out = min(first_out + o % ACROSS, shape.out - 1u);
            let d = o / ACROSS;
            let block = block_at(out / 16u * tile_stride() + (b + d) * STRIDE, out % 16u, out / 16u, b + d);
            tile_w[2u * d * ACROSS + o % ACROSS] = int8x16(block, 0u);
            tile_w[(2u * d + 1u) * ACROSS + o % ACROSS] = int8x16(block, 1u);
            scales_w[o] = block.scale;
        }
        for (var o = lane; o < depth * DOWN; o += LANES) {
            let d = o / DOWN;
            let at = 3u * (min(first_row + o % DOWN, row_count() - 1u) * shape.blocks + b + d);
            tile_x[2u * d * DOWN + o % DOWN] = x[at];
            tile_x[(2u * d + 1u) * DOWN + o % DOWN] = x[at + 1u];
            scales_x[o] = bitcast<f32>(x[at + 2u].x);
        }
        workgroupBarrier();
        for (var d = 0u; d < depth; d += 1u) {
            let at_w = 2u * (d * ACROSS + across);
            let at_x = 2u * d * DOWN + row;
            var low: array<vec4<u32>, N>;
            var high: array<vec4<u32>, N>;
            var scales: array<f32, N>;
            for (var j = 0u; j < N; j++) {
                low[j] = tile_w[at_w + (j % 2u + 2u * SIDE * (j / 2u))];
                high[j] = tile_w[at_w + (j % 2u + 2u * SIDE * (j / 2u) + ACROSS)];
                scales[j] = scales_w[d * ACROSS + 2u * across + (j % 2u + 2u * SIDE * (j / 2u))];
            }
            for (var i = 0u; i < M; i++) {
                let low_x = tile_x[at_x + SIDE * i];
                let high_x = tile_x[at_x + (SIDE * i + DOWN)];
                let scale_x = scales_x[d * DOWN + row + SIDE * i];
                for (var k = 0u; k < N; k++) {
                    let dot = dot16(high[k], high_x, dot16(low[k], low_x, 0));
                    sums[i][k] = fma(f32(dot), scale_x * scales[k], sums[i][k]);
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

fn dot16(a: vec4<u32>, b: vec4<u32>, sum: i32) -> i32 {
    return sum + dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}
