// f16, two in a word. What is beyond its range becomes its largest.
fn narrow4(v: vec4<f32>) -> vec2<u32> {
    let within = clamp(v, vec4(-65504.0), vec4(65504.0));
    return vec2(pack2x16float(within.xy), pack2x16float(within.zw));
}

fn widen4(words: vec2<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
}
