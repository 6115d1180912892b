//! Loops of a fixed length, written out: not every driver does that itself, and where it doesn't, small arrays are no registers.
//! On one software driver a product took five times as long.

/// Writes out every loop `for (var i = 0u; i < N; i++) { .. }` whose N is a name in `lengths`.
pub(super) fn unroll(source: &str, lengths: &[(&str, u32)]) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("for (var ") {
        let (before, from) = rest.split_at(at);
        out += before;
        let Some((name, n, header)) = header(from, lengths) else {
            out += "for (var ";
            rest = &from["for (var ".len()..];
            continue;
        };
        let body = &from[header..header + closing(&from[header..])];
        rest = &from[header + body.len() + 1..];
        let body = unroll(body, lengths);
        for i in 0..n {
            out += "{";
            substitute(&body, name, i, &mut out);
            out += "}";
        }
    }
    out + rest
}

/// The variable, the length, and the bytes of a loop's header with its opening brace.
fn header<'s>(source: &'s str, lengths: &[(&str, u32)]) -> Option<(&'s str, u32, usize)> {
    let name = source.strip_prefix("for (var ")?.split(' ').next()?;
    let bound = source.split_once(&format!("; {name} < "))?.1.split(';').next()?;
    let header = format!("for (var {name} = 0u; {name} < {bound}; {name}++) {{");
    let (_, n) = lengths.iter().find(|(length, _)| *length == bound)?;
    source.starts_with(&header).then_some((name, *n, header.len()))
}

/// Bytes in front of the brace that closes a body.
fn closing(body: &str) -> usize {
    let mut depth = 1;
    let closes = |c: char| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0
    };
    body.find(closes).unwrap_or(body.len())
}

/// Appends `body` with `i` in place of every `name`.
fn substitute(body: &str, name: &str, i: u32, out: &mut String) {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = body;
    while let Some(start) = rest.find(is_word) {
        let end = rest[start..].find(|c| !is_word(c)).map_or(rest.len(), |n| start + n);
        let word = &rest[start..end];
        // What follows a dot is a component.
        let is_it = word == name && !rest[..start].ends_with('.');
        out.push_str(&rest[..start]);
        if is_it {
            out.push_str(&format!("{i}u"));
        } else {
            out.push_str(word);
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_of_known_length_are_written_out_and_others_stay() {
        let source = "for (var b = s; b < n; b += 1u) { for (var i = 0u; i < N; i++) { a[i] += v.i * i2; } }";
        let expected = "for (var b = s; b < n; b += 1u) { { a[0u] += v.i * i2; }{ a[1u] += v.i * i2; } }";
        assert_eq!(unroll(source, &[("N", 2)]), expected);
        assert_eq!(unroll(source, &[]), source);
    }

    #[test]
    fn nested_loops_are_written_out_from_the_inside() {
        let source = "for (var i = 0u; i < N; i++) {for (var k = 0u; k < M; k++) {s[i][k];}}";
        assert_eq!(unroll(source, &[("N", 2), ("M", 2)]), "{{s[0u][0u];}{s[0u][1u];}}{{s[1u][0u];}{s[1u][1u];}}");
    }
}
