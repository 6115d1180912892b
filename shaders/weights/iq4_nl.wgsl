// iq4_nl weights: a vector of 16 bytes, whose low halves number the levels of the first 16 columns and whose high ones those of the others;
// then the scales. The levels are looked up in workgroup memory.
const STRIDE: u32 = 18u; // vectors in a block
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale

struct Block {
    quants: vec4<u32>,
    scale: f32,
}

const LEVELS = array<f32, 16>(
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
);

var<workgroup> levels: array<f32, 16>;

fn prepare(lane: u32, lanes: u32) {
    var all = LEVELS;
    if (lane < 16u) {
        levels[lane] = all[lane];
    }
    workgroupBarrier();
}

fn block_at(at: u32, row: u32) -> Block {
    return Block(weights[at + row], scale_at(at + 16u, row));
}

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let numbers = unpack4xU8((block.quants[j % 4u] >> (j / 4u * 4u)) & 0x0f0f0f0fu);
    return vec4(levels[numbers.x], levels[numbers.y], levels[numbers.z], levels[numbers.w]);
}
