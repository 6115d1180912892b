// iq4_nl weights as in iq4_nl.wgsl, for adapters on which a look-up costs more than arithmetic: the levels are a polynomial, rounded.
const BIAS: f32 = 0.0;   // what `block4` adds to every weight, before the scale

// The best fit of degree 5 to the levels at n - 7.5.
const C0: f32 = -4.41767502;
const C1: f32 = 11.6164503;
const C2: f32 = -0.113498159;
const C3: f32 = 0.0697852671;
const C4: f32 = 0.00108435773;
const C5: f32 = 0.000144791396;

fn prepare(lane: u32, lanes: u32) {
}

// Columns 4j to 4j + 4. The polynomial is within 0.38 of every level.
fn block4(block: Block, j: u32) -> vec4<f32> {
    let n = vec4<f32>(nibbles4(block, j)) - 7.5;
    return round(((((C5 * n + C4) * n + C3) * n + C2) * n + C1) * n + C0);
}
