// What formats have in common to whose weights nothing is added, and whose blocks share nothing.
const SHARED: u32 = 0u; // vectors that 8 blocks share
const ADDS: bool = false;

fn added(block: Block) -> f32 {
    return 0.0;
}
