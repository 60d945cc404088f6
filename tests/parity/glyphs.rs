//! The embedded task: its prompts, its pictures, and prompt files.

use flowrl_dist::data::{
    Format, PromptSet,
    glyphs::{Colour, GROUNDS, GlyphPrompt, HELD_OUT, INKS, colour_pairs, contrast, is_held_out},
    render::{Face, HEIGHT, Style, WIDTH, render},
};
use std::collections::HashSet;

fn parse_error(prompt: &str) -> String {
    GlyphPrompt::parse(prompt).unwrap_err().to_string()
}

#[test]
fn a_prompt_parses_and_prints_itself() {
    let prompt = GlyphPrompt::parse(r#""417" in red on yellow"#).unwrap();
    assert_eq!(prompt, GlyphPrompt { text: "417".into(), ink: Colour::Red, ground: Colour::Yellow });
    for text in [r#""417" in red on yellow"#, r#""Tiger" in white on black"#, r#""0" in black on sky"#] {
        assert_eq!(GlyphPrompt::parse(text).unwrap().to_string(), text);
    }
    assert!(GlyphPrompt::parse("  \"417\"   in red  on yellow\n").is_ok());
}

#[test]
fn a_wrong_prompt_says_what_is_wrong_and_what_to_do() {
    for prompt in ["", "417 in red on yellow", "\"417", "\"417\"", "\"417\" in red", "\"417\" in red on yellow please"]
    {
        assert!(parse_error(prompt).contains("not of the form"), "{prompt}");
    }
    for prompt in
        ["\"\" in red on yellow", "\"123456\" in red on yellow", "\"4 7\" in red on sky", "\"é\" in red on sky"]
    {
        assert!(parse_error(prompt).contains("must be 1 to 5 ASCII letters or digits"), "{prompt}");
    }
    assert_eq!(
        parse_error("\"417\" in pink on yellow"),
        r#"prompt "\"417\" in pink on yellow": unknown ink "pink"; use black, white, red, green, blue, purple"#
    );
    assert!(
        parse_error("\"417\" in red on green").ends_with(r#"unknown ground "green"; use white, yellow, sky, black"#)
    );
    assert!(parse_error("\"417\" in white on white").ends_with("on white use black, red, green, blue, purple"));
    assert!(parse_error("\"417\" in blue on black").contains("hard to read"));
}

#[test]
fn colour_pairs_are_readable_and_use_the_whole_palette() {
    let pairs: Vec<_> = colour_pairs().collect();
    assert_eq!(pairs.len(), 18);
    assert_eq!(pairs.iter().collect::<HashSet<_>>().len(), 18);
    assert!(pairs.iter().all(|&(ink, ground)| ink != ground && contrast(ink, ground) >= 3.0));
    assert!(INKS.iter().all(|ink| pairs.iter().any(|pair| pair.0 == *ink)));
    assert!(GROUNDS.iter().all(|ground| pairs.iter().any(|pair| pair.1 == *ground)));
    assert!((contrast(Colour::Black, Colour::White) - 21.0).abs() < 1e-12);
}

#[test]
fn two_hundred_numbers_are_held_out_for_good() {
    let held_out: Vec<String> = (0..1000).map(|n| format!("{n:03}")).filter(|text| is_held_out(text)).collect();
    assert_eq!(held_out.len(), HELD_OUT);
    // Pinned: other numbers would make trained models cheat.
    assert_eq!(held_out[..5], ["003", "010", "018", "021", "033"]);
    assert_eq!(held_out[199], "997");
    for text in ["", "2", "0002", "+02", "abc", "²²²"] {
        assert!(!is_held_out(text), "{text}");
    }
}

#[test]
fn prompt_sets_are_disjoint_in_their_numbers_and_numbered_in_order() {
    let (train, eval) = (PromptSet::train("glyphs").unwrap(), PromptSet::eval("glyphs").unwrap());
    assert_eq!((train.len(), eval.len()), (800 * 18, 200));
    for (set, held_out) in [(&train, false), (&eval, true)] {
        for (i, prompt) in set.prompts.iter().enumerate() {
            assert_eq!(prompt.index, i);
            assert_eq!(is_held_out(&GlyphPrompt::parse(&prompt.text).unwrap().text), held_out);
        }
        assert_eq!(set.prompts.iter().map(|prompt| &prompt.text).collect::<HashSet<_>>().len(), set.len());
    }
    assert_eq!(&*train.prompts[0].text, r#""000" in black on white"#);
    assert_eq!(train, PromptSet::train("glyphs").unwrap());
    let pairs: HashSet<_> = eval.prompts.iter().map(|prompt| prompt.text[6..].to_string()).collect();
    assert_eq!(pairs.len(), 18);
}

#[test]
fn every_residue_is_another_style() {
    let styles: Vec<Style> = (0..Style::COUNT).map(Style::from_bits).collect();
    for (i, style) in styles.iter().enumerate() {
        assert!(!styles[..i].contains(style));
        assert!(style.dx.abs() <= 1 && style.dy.abs() <= 1);
    }
    assert_eq!(Style::from_bits(u64::MAX), Style::from_bits(u64::MAX % Style::COUNT));
}

/// The rows and columns a picture's text touches, inclusive: (top, bottom, left, right).
fn extent(text: &str, style: Style) -> (usize, usize, usize, usize) {
    let prompt = GlyphPrompt { text: text.into(), ink: Colour::Black, ground: Colour::White };
    let picture = render(&prompt, &style);
    assert_eq!(picture.len(), 3 * HEIGHT * WIDTH);
    let inked: Vec<usize> = (0..HEIGHT * WIDTH).filter(|&i| picture[i] < 0.9).collect();
    let rows = inked.iter().map(|i| i / WIDTH);
    let columns = inked.iter().map(|i| i % WIDTH);
    (rows.clone().min().unwrap(), rows.max().unwrap(), columns.clone().min().unwrap(), columns.max().unwrap())
}

#[test]
fn the_text_stays_inside_the_picture_and_near_its_middle() {
    for face in Face::ALL {
        for text in ["000", "417", "999", "Tiger", "WWWWW"] {
            let (top, bottom, left, right) = extent(text, Style { face, dx: 0, dy: 0 });
            assert!(left >= 1 && right <= WIDTH - 2, "{text} {face:?}: columns {left}..={right}");
            assert!(left.abs_diff(WIDTH - 1 - right) <= 4, "{text} {face:?}: columns {left}..={right}");
            assert!(top >= 1 && bottom < HEIGHT, "{text} {face:?}: rows {top}..={bottom}");
        }
        let (top, bottom, left, right) = extent("417", Style { face, dx: 0, dy: 0 });
        assert!(top.abs_diff(HEIGHT - 1 - bottom) <= 1, "{face:?}: rows {top}..={bottom}");
        let shifted = extent("417", Style { face, dx: 1, dy: -1 });
        assert_eq!(shifted, (top - 1, bottom - 1, left + 1, right + 1));
    }
}

#[test]
fn a_picture_mixes_its_ink_and_its_ground() {
    let prompt = GlyphPrompt::parse(r#""417" in red on yellow"#).unwrap();
    let picture = render(&prompt, &Style::from_bits(0));
    assert_eq!(picture, render(&prompt, &Style::from_bits(0)));
    let pixel = |i: usize| [0, 1, 2].map(|c| (picture[c * HEIGHT * WIDTH + i] * 255.0).round() as u8);
    assert_eq!(pixel(0), Colour::Yellow.rgb());
    let inked = (0..HEIGHT * WIDTH).filter(|&i| pixel(i) == Colour::Red.rgb()).count();
    assert!((100..500).contains(&inked), "{inked} pixels of pure ink");
    assert!(picture.iter().all(|value| (0.0..=1.0).contains(value)));
}

fn read(name: &str, bytes: &[u8]) -> Result<Vec<String>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let set = PromptSet::from_file(&path, Format::Auto).map_err(|error| error.to_string())?;
    assert!(set.prompts.iter().enumerate().all(|(i, prompt)| prompt.index == i));
    Ok(set.prompts.into_iter().map(|prompt| prompt.text.to_string()).collect())
}

#[test]
fn prompt_files_of_every_make_read_the_same() {
    let want = Ok(vec!["a cat".to_string(), "ein Kätzchen".to_string(), "a cat".to_string()]);
    for text in [
        "a cat\nein Kätzchen\na cat",
        "a cat\nein Kätzchen\na cat\n",
        "\u{feff}a cat\r\nein Kätzchen\r\na cat\r\n",
        "\n  a cat \t\n\n\nein Kätzchen\n \na cat\n\n",
    ] {
        assert_eq!(read("prompts.txt", text.as_bytes()), want, "{text:?}");
    }
    let lines = "\u{feff}{\"prompt\": \"a cat\", \"tag\": 1}\r\n\r\n{\"prompt\":\" ein K\\u00e4tzchen \"}\n{\"prompt\":\"a cat\"}";
    assert_eq!(read("prompts.jsonl", lines.as_bytes()), want);
    assert_eq!(read("prompts.JSONL", lines.as_bytes()), want);
}

#[test]
fn a_wrong_prompt_file_is_named_with_its_line() {
    let error = |name: &str, bytes: &[u8]| read(name, bytes).unwrap_err();
    assert!(error("p.txt", b"a\nb\xff\n").ends_with("p.txt: line 2: not UTF-8; save the file as UTF-8"));
    assert!(error("p.txt", b" \n\r\n").ends_with("p.txt: no prompt in this file; write one prompt a line"));
    for line in ["a cat", "{\"text\": \"a cat\"}", "{\"prompt\": 3}", "{\"prompt\": \" \"}", "[]"] {
        let message = error("p.jsonl", format!("{{\"prompt\": \"a\"}}\n{line}\n").as_bytes());
        assert!(
            message.contains("p.jsonl: line 2: ") && message.ends_with("; write {\"prompt\": \"...\"}"),
            "{message}"
        );
        assert!(!message.contains('\n'));
    }
    let missing = PromptSet::from_file("no/such/file.txt", Format::Auto).unwrap_err().to_string();
    assert!(missing.starts_with("no/such/file.txt: "), "{missing}");
}
