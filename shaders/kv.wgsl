// Where keys and values lie: pages of one size in bytes, [page][key-value head][position in page][pair of elements].
override KV_F16: bool = false;

const BLOCK: u32 = 64u; // positions in a block of attention, and in an f32 page

// The first pair of a head at a position, given the sequence's table; an f32 pair is two words, an f16 pair one.
fn kv_pair(table: u32, position: u32, head: u32) -> u32 {
    let page_len = select(BLOCK, 2u * BLOCK, KV_F16);
    let page = tables[table + position / page_len];
    return ((page * shape.kv_heads + head) * page_len + position % page_len) * shape.half_head;
}
