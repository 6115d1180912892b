// iq4_nl weights: 4-bit numbers of levels, which are looked up in workgroup memory.
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale

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

// Columns 4j to 4j + 4.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let numbers = nibbles4(block, j);
    return vec4(levels[numbers.x], levels[numbers.y], levels[numbers.z], levels[numbers.w]);
}
