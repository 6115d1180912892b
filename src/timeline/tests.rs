use super::*;
use serde_json::{Value, json};

/// A span at these microseconds, for as many.
fn span(stage: usize, rank: usize, cat: &str, ts: f64, dur: f64, micro_batch: u64) -> Value {
    let args = json!({"stage": stage, "rank": rank, "micro_batch": micro_batch, "rows": 16});
    json!({"name": cat, "cat": cat, "ph": "X", "pid": 1, "tid": 0, "ts": ts, "dur": dur, "args": args})
}

fn named(name: &str) -> Value {
    json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": 0, "args": {"name": name}})
}

fn timeline(events: &[Value]) -> Timeline {
    Timeline::from_json(&json!({"traceEvents": events, "displayTimeUnit": "ms"}).to_string()).unwrap()
}

/// Two stages over two micro-batches, numbers 40 and 41: 10 ms in all.
fn pipeline() -> Timeline {
    timeline(&[
        named("stage 0 rank 0 (cpu)"),
        named("stage 1 rank 0 (gpu:0)"),
        span(0, 0, "compute", 5000.0, 3000.0, 40),
        span(0, 0, "read", 8000.0, 1000.0, 40),
        span(0, 0, "compute", 9000.0, 4000.0, 41),
        span(1, 0, "schedule", 5000.0, 4000.0, 40),
        span(1, 0, "write", 9000.0, 1000.0, 40),
        span(1, 0, "compute", 10000.0, 2000.0, 40),
        span(1, 0, "write", 12000.0, 1000.0, 41),
        span(1, 0, "compute", 13000.0, 2000.0, 41),
    ])
}

/// What `parts` of the picture there are.
fn count(text: &str, part: &str) -> usize {
    text.matches(part).count()
}

#[test]
fn spans_of_a_micro_batch_that_follow_one_another_are_a_box() {
    let stays = |timeline: &Timeline, row: usize| -> Vec<(u64, f64, f64)> {
        timeline.rows[row].stays().map(|stay| (stay.number(timeline.first()), stay.start, stay.end)).collect()
    };
    let found = pipeline();
    assert_eq!(stays(&found, 0), [(1, 0.0, 4.0), (2, 4.0, 8.0)]);
    assert_eq!(stays(&found, 1), [(1, 4.0, 7.0), (2, 7.0, 10.0)]);
    assert_eq!(found.range_ms(), (0.0, 10.0));
    // In any order, with a gap, and back again after another.
    let found = timeline(&[
        span(0, 0, "compute", 9000.0, 1000.0, 1),
        span(0, 0, "reduce", 3000.0, 1000.0, 1),
        span(0, 0, "compute", 0.0, 2000.0, 1),
        span(0, 0, "compute", 5000.0, 1000.0, 2),
    ]);
    assert_eq!(stays(&found, 0), [(1, 0.0, 4.0), (2, 5.0, 6.0), (1, 9.0, 10.0)]);
}

#[test]
fn busy_is_the_share_of_the_whole_time_that_is_computing() {
    let busy = pipeline().busy();
    assert_eq!([busy[0].share, busy[1].share], [0.7, 0.4]);
    assert_eq!((busy[1].elapsed_ms, busy[1].computing_ms, busy[1].spans), (10.0, 4.0, 4), "waiting is no span of work");
    assert_eq!((busy[1].stage, busy[1].rank, busy[1].device.as_str()), (1, 0, "gpu:0"));
    let overlapping =
        timeline(&[span(0, 0, "compute", 0.0, 4000.0, 1), span(0, 0, "compute", 1000.0, 5000.0, 1), span(0, 0, "read", 6000.0, 2000.0, 1)]);
    assert_eq!(overlapping.busy()[0].share, 0.75, "no time is computed in twice");
}

#[test]
fn what_was_waited_before_the_first_micro_batch_is_not_shown() {
    let found = timeline(&[
        span(0, 0, "schedule", 0.0, 9000.0, 5),
        span(1, 0, "schedule", 2000.0, 9000.0, 5),
        span(0, 0, "compute", 9000.0, 2000.0, 5),
        span(1, 0, "compute", 11000.0, 2000.0, 5),
    ]);
    assert_eq!(found.range_ms(), (0.0, 4.0));
    assert_eq!((found.rows[0].waits.len(), found.rows[1].waits[0].start, found.rows[1].waits[0].end), (0, 0.0, 2.0));
}

#[test]
fn text_has_a_line_a_rank_with_micro_batches_and_shares() {
    // 22 of 100 columns are labels, 8 are bars and shares, 7 are left for each of 10 ms.
    let text = pipeline().text(100);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].contains("  0.000 ") && lines[0].ends_with(" 10.000 ms  busy"), "{text}");
    let line = |parts: &[(&str, usize)]| parts.iter().map(|(symbol, times)| symbol.repeat(*times)).collect::<String>();
    let first = line(&[("1", 21), ("-", 7), ("2", 28), (" ", 14)]);
    let second = line(&[(".", 28), ("-", 7), ("1", 14), ("-", 7), ("2", 14)]);
    assert_eq!(lines[1], format!("stage 0 rank 0 (cpu)   |{first}|  70%"));
    assert_eq!(lines[2], format!("stage 1 rank 0 (gpu:0) |{second}|  40%"));
    for columns in [0, 40, 1000, usize::MAX] {
        let widest = pipeline().text(columns).lines().take(3).map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= columns.clamp(40, 1000), "{widest} of {columns}");
    }
}

#[test]
fn the_picture_has_boxes_with_tooltips_numbers_and_shares() {
    let svg = pipeline().svg();
    for (part, times) in
        [("<g fill=", 4), ("<title>micro-batch 1: 16 rows, ", 2), ("<title>micro-batch 2: 16 rows, ", 2), (">2</text></g>", 2)]
    {
        assert_eq!(count(&svg, part), times, "{part} in {svg}");
    }
    for part in [
        "micro-batch 1: 16 rows, 4.000 ms from 0.000 ms, 3.000 ms of them",
        ">stage 0 rank 0 (cpu)<",
        ">70%<",
        ">40%<",
        ">10 ms<",
        "waiting for the next micro-batch</title>",
    ] {
        assert!(svg.contains(part), "{part} in {svg}");
    }
    assert_eq!(count(&svg, "<g"), count(&svg, "</g>"));
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
}

#[test]
fn names_are_escaped_and_cannot_command_a_terminal() {
    let found = timeline(&[named("stage 0 rank 0 (<a & \"b's\">\u{1b}[2J\u{0})"), span(0, 0, "compute", 0.0, 1.0, 1)]);
    let svg = found.svg();
    assert!(svg.contains("stage 0 rank 0 (&lt;a &amp; &quot;b&apos;s&quot;&gt;\u{FFFD}[2J\u{FFFD})"), "{svg}");
    assert!(!svg.contains('\u{1b}') && !found.text(200).contains('\u{1b}'));
}

#[test]
fn a_part_is_cut_out_and_counts_from_its_own_first_micro_batch() {
    let part = pipeline().between(7.0, 9.0).unwrap();
    assert_eq!((part.range_ms(), part.first()), ((7.0, 9.0), 41));
    assert_eq!([part.busy()[0].computing_ms, part.busy()[1].computing_ms], [1.0, 1.0]);
    assert!(part.svg().contains(">8.0 ms<") && part.svg().contains("<title>micro-batch 1: "), "{}", part.svg());
    assert_eq!(pipeline().between(-5.0, f64::INFINITY).unwrap(), pipeline());
    let gap = pipeline().between(9.0, 9.5).unwrap();
    assert_eq!((gap.busy()[0].spans, gap.busy()[0].share, gap.busy()[1].spans), (0, 0.0, 1));
    for (from, to, words) in [
        (10.0, 11.0, "from 10 makes no sense"),
        (f64::NAN, 1.0, "from NaN"),
        (f64::INFINITY, f64::INFINITY, "from inf"),
        (2.0, 2.0, "to 2 makes no sense"),
        (2.0, f64::NAN, "to NaN"),
        (-5.0, 0.0, "to 0"),
    ] {
        let message = pipeline().between(from, to).unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn nothing_recorded_is_a_picture_that_says_so() {
    for events in [vec![], vec![json!({}), json!({"ph": "B", "ts": 3, "args": {"stage": 1}}), span(0, 0, "rest", 0.0, 1.0, 1)]] {
        let empty = timeline(&events);
        assert!(empty.busy().is_empty() && empty.range_ms() == (0.0, 0.0));
        assert!(empty.svg().contains("nothing was recorded") && empty.text(80).contains("nothing was recorded"));
    }
    let idle = timeline(&[named("stage 0 rank 3 (cpu)")]);
    assert_eq!((idle.busy()[0].rank, idle.busy()[0].share), (3, 0.0));
    assert!(idle.svg().contains(">0%<") && idle.text(80).contains("stage 0 rank 3 (cpu)"));
}

#[test]
fn numbers_that_make_no_sense_are_passed_over_or_drawn_somewhere() {
    let (largest, max) = (f64::MAX, u64::MAX);
    for (ts, dur, kept) in [
        (0.0, -1.0, 0),
        (largest, 1.0, 0),
        (-largest, 1.0, 0),
        (0.0, largest, 0),
        (1e16, 1.0, 0),
        (-1e15, 1e15, 1),
        (1e15, 0.0, 1),
        (5e-324, 5e-324, 1),
    ] {
        let found = timeline(&[span(max as usize, max as usize, "compute", ts, dur, max), span(max as usize, 0, "read", 1.0, 1.0, 0)]);
        assert_eq!(found.rows.iter().map(|row| row.work.len()).sum::<usize>(), 1 + kept, "{ts} for {dur}");
        for picture in [found.svg(), found.text(100)] {
            assert!(!picture.contains("NaN") && !picture.contains("inf"), "{ts} for {dur}: {picture}");
        }
        assert!(found.busy().iter().all(|busy| (0.0..=1.0).contains(&busy.share)));
    }
    let alone = timeline(&[span(0, 0, "compute", 1e15, 0.0, max)]);
    assert!(!alone.svg().contains("NaN") && !alone.svg().contains("inf") && alone.text(80).contains('1'));
}

#[test]
fn what_is_no_trace_is_refused_with_the_reason() {
    for (text, words) in [
        ("", "EOF"),
        ("[]", "expected an object with traceEvents"),
        ("{}", "missing field `traceEvents`"),
        ("{\"traceEvents\": 3}", "a list of events"),
        ("{\"traceEvents\": [3]}", "expected an event"),
        ("{\"traceEvents\": [{\"ts\": NaN}]}", "line 1"),
        ("{\"traceEvents\": [{\"ts\": 1e999}]}", "out of range"),
        ("{\"traceEvents\": [{\"args\": {\"micro_batch\": -1}}]}", "-1"),
        ("{\"traceEvents\": [{}", "EOF"),
        (&"[".repeat(100_000), "line 1 column"),
        (&format!("{{\"a\": {}", "[".repeat(100_000)), "no trace"),
    ] {
        let message = Timeline::from_json(text).unwrap_err().to_string();
        assert!(message.starts_with("the text is no trace that can be drawn: ") && message.contains(words), "{message}");
    }
}

#[test]
fn a_trace_that_was_cut_short_says_by_how_much() {
    let read = |trace: &str| Timeline::from_json(trace).unwrap();
    assert_eq!(read(r#"{"traceEvents": [], "dropped": 77}"#).dropped(), 77);
    assert_eq!(read(r#"{"traceEvents": []}"#).dropped(), 0);
}
