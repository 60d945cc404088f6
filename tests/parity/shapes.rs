//! The embedded task of shapes: its prompts, its pictures, and the rules that score them.

use flowrl_dist::data::shapes::{
    Colour, GROUND, Group, Object, Relation, SIDE, Shape, ShapesPrompt, Tag, draw, is_held_out, layout, prompts, render,
};
use flowrl_dist::data::{PromptSet, Split};
use flowrl_dist::reward::shapes::{FactKind, Seen, credit, facts, is_strict, objects};
use flowrl_dist::rng::{Purpose, Stream};
use image::{Rgb, RgbImage};
use std::collections::{BTreeMap, BTreeSet};

fn prompt(text: &str) -> ShapesPrompt {
    ShapesPrompt::parse(text).unwrap()
}

/// Styles that look random.
fn style(index: u64) -> u64 {
    Stream::new(1, Purpose::Pretrain, [index, 0, 0, 0]).word(0)
}

/// Eight bits a channel.
fn picture(values: &[f32]) -> RgbImage {
    RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
        let at = y as usize * SIDE + x as usize;
        Rgb([0, 1, 2].map(|c| (values[c * SIDE * SIDE + at].clamp(0.0, 1.0) * 255.0).round() as u8))
    })
}

fn seen(objects_drawn: &[Object]) -> Vec<Seen> {
    objects(&picture(&draw(objects_drawn)))
}

/// The facts that a picture of `shown` gets wrong of what `asked` asks for.
fn wrong(asked: &str, shown: &str) -> Vec<FactKind> {
    let seen = objects(&picture(&render(&prompt(shown), style(5))));
    facts(&prompt(asked), &seen).into_iter().filter(|fact| fact.credit < 1.0).map(|fact| fact.kind).collect()
}

#[test]
fn a_prompt_parses_and_prints_itself() {
    let group = |count, colour, shape| Group { count, colour, shape };
    let second = Some((Relation::LeftOf, group(1, Some(Colour::Blue), Shape::Square)));
    let first = group(2, Some(Colour::Red), Shape::Circle);
    assert_eq!(prompt("two red circles left of a blue square"), ShapesPrompt { first, second });
    for split in [Split::Train, Split::Eval] {
        for said in prompts(split) {
            assert_eq!(prompt(&said.to_string()), said, "{said}");
        }
    }
    for text in ["a circle", "four yellow triangles", "two squares below a magenta circle"] {
        assert_eq!(prompt(text).to_string(), text);
    }
    assert_eq!(prompt("  a  circle above\ta square "), prompt("a circle above a square"));
}

#[test]
fn a_wrong_prompt_names_the_word_and_says_what_to_do() {
    for (text, message) in [
        ("", "ends where a count (a, two, three, four) must follow"),
        ("five circles", "unknown count \"five\"; use a, two, three, four"),
        ("a pink circle", "unknown word \"pink\"; use circle, square, triangle, red, green, blue, yellow, magenta"),
        ("two red stars", "unknown shape \"stars\"; use circles, squares, triangles"),
        ("two red circle", "unknown shape \"circle\"; use circles, squares, triangles"),
        ("a red", "ends where a shape must follow"),
        ("a circle near a square", "unknown relation \"near\"; use and, left of, right of, above, below"),
        ("a circle left a square", "\"left\" without \"of\"; write \"left of\""),
        ("a circle left of", "ends where a count (a, two, three, four) must follow"),
        ("a circle and a square and a triangle", "\"and\" after the second group; at most two groups can be asked for"),
        ("a circle and two circles", "two groups of circles; groups must be of different shapes"),
        ("three circles and a square", "three circles beside another group; use a or two"),
    ] {
        let error = ShapesPrompt::parse(text).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let error = error.to_string();
        assert!(error.starts_with(&format!("prompt {text:?}: {message}")), "{error}");
    }
}

#[test]
fn tags_are_genevals() {
    for (text, tag) in [
        ("a circle", Tag::SingleObject),
        ("a red circle", Tag::Colours),
        ("three circles", Tag::Counting),
        ("two red circles", Tag::Counting),
        ("a circle and two squares", Tag::TwoObject),
        ("a red circle and a blue square", Tag::ColourAttribution),
        ("a circle above a square", Tag::Position),
        ("two red circles left of a blue square", Tag::Position),
    ] {
        assert_eq!(prompt(text).tag(), tag, "{text}");
    }
}

#[test]
fn no_combination_is_both_trained_and_held_out() {
    let (train, eval) = (PromptSet::train("shapes").unwrap(), PromptSet::eval("shapes").unwrap());
    let counts = |set: &PromptSet| {
        let mut counts = BTreeMap::new();
        set.prompts.iter().for_each(|p| *counts.entry(prompt(&p.text).tag()).or_insert(0) += 1);
        counts.into_values().collect::<Vec<_>>() // in the order of Tag
    };
    assert_eq!(counts(&train), [50, 100, 500, 100, 700, 300]);
    assert_eq!(counts(&eval), [20; 6]);
    for (set, held_out) in [(&train, false), (&eval, true)] {
        for (i, p) in set.prompts.iter().enumerate() {
            assert_eq!((p.index, is_held_out(&prompt(&p.text))), (i, held_out), "{}", p.text);
        }
    }
    // Pinned: another share-out would make trained models cheat.
    let texts: BTreeSet<&str> = eval.prompts.iter().map(|p| &*p.text).collect();
    assert_eq!(texts.len(), 54);
    assert_eq!(
        [0, 20, 40, 60, 80, 100].map(|i| &*eval.prompts[i].text),
        [
            "a square",
            "a square and a triangle",
            "four blue circles",
            "a green triangle",
            "a red triangle left of a yellow square",
            "a red triangle and two blue squares",
        ]
    );
    assert!(
        is_held_out(&prompt("a square right of a red circle")) == is_held_out(&prompt("a red circle left of a square"))
    );
}

#[test]
fn a_picture_is_a_function_of_its_prompt_and_style() {
    let red = prompt("two red circles left of a blue square");
    let values = render(&red, 7);
    assert_eq!(values.len(), 3 * SIDE * SIDE);
    assert_eq!(values, render(&red, 7));
    assert_ne!(values, render(&red, 8));
    let first = picture(&values);
    assert_eq!(first.get_pixel(0, 0).0, GROUND);
    let of = |colour: Colour| first.pixels().filter(|pixel| pixel.0 == colour.rgb()).count();
    // Two discs of radius 4.8 to 5.6 and a square of side 8.6 to 10.1, without their antialiased edges.
    assert!((80..200).contains(&of(Colour::Red)), "{}", of(Colour::Red));
    assert!((49..101).contains(&of(Colour::Blue)), "{}", of(Colour::Blue));
}

/// Extents, not pixels: what the layout promises.
#[test]
fn shapes_stay_inside_the_picture_and_apart() {
    for (i, said) in prompts(Split::Train).chain(prompts(Split::Eval)).enumerate() {
        let objects = layout(&said, style(i as u64));
        assert_eq!(objects.len(), said.groups().map(|group| group.count).sum::<usize>());
        let half = |object: &Object| match object.shape {
            Shape::Circle => (1.0, 1.0),
            Shape::Square => (0.9, 0.9),
            Shape::Triangle => (1.04, 0.9),
        };
        for (place, a) in objects.iter().enumerate() {
            let (x, y) = (half(a).0 * a.size, half(a).1 * a.size);
            let side = SIDE as f64;
            assert!(a.x - x > 1.0 && a.x + x < side - 1.0 && a.y - y > 1.0 && a.y + y < side - 1.0, "{said}: {a:?}");
            for b in &objects[place + 1..] {
                let gap_x = (a.x - b.x).abs() - half(a).0 * a.size - half(b).0 * b.size;
                let gap_y = (a.y - b.y).abs() - half(a).1 * a.size - half(b).1 * b.size;
                assert!(gap_x.max(gap_y) > 1.5, "{said}: {a:?} {b:?}");
            }
        }
    }
}

#[test]
fn renders_of_all_prompts_score_in_full() {
    let all: BTreeSet<ShapesPrompt> = prompts(Split::Train).chain(prompts(Split::Eval)).collect();
    assert!(all.len() > 1000, "{}", all.len());
    for (i, said) in all.iter().enumerate() {
        for look in 0..4 {
            let seen = objects(&picture(&render(said, style((4 * i + look) as u64))));
            let facts = facts(said, &seen);
            assert!(is_strict(&facts) && credit(&facts) == 1.0, "{said}, {look}: {facts:?} {seen:?}");
        }
    }
}

#[test]
fn a_wrong_picture_loses_the_facts_that_it_gets_wrong_and_no_others() {
    use FactKind::{Colour, Count, NothingElse, Relation, Shape};
    for (asked, shown, lost) in [
        ("a red circle", "a red circle", &[][..]),
        ("two circles", "three circles", &[Count]),
        ("four circles", "a circle", &[Count]),
        ("a red circle", "a blue circle", &[Colour]),
        ("three red circles", "three green circles", &[Colour]),
        ("a circle left of a square", "a circle right of a square", &[Relation]),
        ("a circle left of a square", "a circle above a square", &[Relation]),
        ("a red circle above a blue square", "a blue circle above a red square", &[Colour, Colour]),
        ("a circle", "a square", &[Shape, Count, NothingElse]),
        ("a circle", "a circle and a square", &[NothingElse]),
        ("a circle and a square", "a square", &[Shape, Count]),
        ("a circle below a square", "a circle", &[Shape, Count, Relation]),
        ("two red circles left of a blue square", "a red circle left of a blue square", &[Count]),
        (
            "two red circles left of a blue square",
            "two red circles left of a blue triangle",
            &[Shape, Count, Colour, Relation, NothingElse],
        ),
    ] {
        assert_eq!(wrong(asked, shown), lost, "{asked:?} of {shown:?}");
    }
}

/// By hand: a circle twice, and one square in two colours' worth of circles.
#[test]
fn credits_are_those_of_the_formulas() {
    let seen = |shape, colour, x, y| Seen { shape: Some(shape), colour, area: 80, place: (x, y) };
    let credits = |asked: &str, objects: &[Seen]| -> Vec<f64> {
        facts(&prompt(asked), objects).into_iter().map(|fact| fact.credit).collect()
    };
    let (circle, square) = (Shape::Circle, Shape::Square);
    let three = [
        seen(circle, Colour::Red, 0.2, 0.2),
        seen(circle, Colour::Red, 0.2, 0.8),
        seen(circle, Colour::Blue, 0.8, 0.8),
    ];
    // There, 1 - 1/2 for three instead of two, two of three red, nothing else.
    assert_eq!(credits("two red circles", &three), [1.0, 0.5, 2.0 / 3.0, 1.0]);
    assert_eq!(credits("four circles", &three), [1.0, 0.75, 1.0]);
    assert_eq!(credits("a circle", &three), [1.0, 0.0, 1.0]);
    // The circles' centre is (0.4, 0.6): the square at (0.9, 0.3) lies right of it, and not enough above.
    let with_square: Vec<Seen> = three.into_iter().chain([seen(square, Colour::Green, 0.9, 0.3)]).collect();
    assert_eq!(credits("two circles left of a square", &with_square), [1.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(credits("two circles below a square", &with_square), [1.0, 0.5, 1.0, 1.0, 0.0, 1.0]);
    assert_eq!(credits("a triangle", &with_square), [0.0, 0.0, 0.0]);
    assert_eq!(credits("a triangle", &[]), [0.0, 0.0, 1.0]);
    let facts = facts(&prompt("two red circles"), &three);
    assert!((credit(&facts) - (1.0 + 0.5 + 2.0 / 3.0 + 1.0) / 4.0).abs() < 1e-12 && !is_strict(&facts));
}

/// Gaussian noise of 0.1 on values in [0, 1], as large as a bad sample's.
#[test]
fn noise_and_turns_change_little() {
    let all: BTreeSet<ShapesPrompt> = prompts(Split::Eval).collect();
    let (mut strict, mut turned, mut count) = (0, 0, 0);
    for (i, said) in all.iter().enumerate() {
        for look in 0..10 {
            let index = (10 * i + look) as u64;
            let noise = Stream::new(2, Purpose::Pretrain, [index, 0, 0, 0]).normals(3 * SIDE * SIDE);
            let noisy: Vec<f32> = render(said, style(index)).iter().zip(noise).map(|(v, n)| v + 0.1 * n).collect();
            strict += usize::from(is_strict(&facts(said, &objects(&picture(&noisy)))));
            let mut objects_turned = layout(said, style(index));
            for (place, object) in objects_turned.iter_mut().enumerate() {
                object.turn = 0.7 * (look + place) as f64;
            }
            turned += usize::from(is_strict(&facts(said, &seen(&objects_turned))));
            count += 1;
        }
    }
    println!("of {count}: {strict} noisy, {turned} turned");
    assert!(strict as f64 >= 0.97 * count as f64, "noisy: {strict} of {count}");
    assert!(turned as f64 >= 0.97 * count as f64, "turned: {turned} of {count}");
}

#[test]
fn what_is_tiny_touching_or_no_shape_is_seen_for_what_it_is() {
    let object = |shape, colour, x: f64, y: f64, size: f64| Object { shape, colour, x, y, size, turn: 0.0 };
    // Smaller than six pixels: not there. Smaller than 22: there, but of no shape.
    assert_eq!(seen(&[object(Shape::Circle, Colour::Red, 16.0, 16.0, 1.2)]), []);
    let small = seen(&[object(Shape::Circle, Colour::Red, 16.0, 16.0, 2.0)]);
    assert_eq!((small.len(), small[0].shape, small[0].colour), (1, None, Colour::Red));
    // Two circles of one colour that touch are one thing of no shape; of two colours they are two circles.
    let [left, right] = [(Colour::Red, 10.0), (Colour::Red, 20.0)].map(|(c, x)| object(Shape::Circle, c, x, 16.0, 5.2));
    let touching = seen(&[left, right]);
    assert_eq!((touching.len(), touching[0].shape), (1, None));
    let touching = seen(&[left, Object { colour: Colour::Blue, ..right }]);
    let found: BTreeSet<_> = touching.iter().map(|o| (o.colour, o.shape)).collect();
    assert_eq!(found, [(Colour::Red, Some(Shape::Circle)), (Colour::Blue, Some(Shape::Circle))].into());
    // A bar of 20 x 6, a ring and a cross are no shapes.
    let pixels = |is: &dyn Fn(i32, i32) -> bool| {
        objects(&RgbImage::from_fn(32, 32, |x, y| {
            Rgb(if is(x as i32 - 16, y as i32 - 16) { Colour::Green.rgb() } else { GROUND })
        }))
    };
    let shapes = |seen: Vec<Seen>| seen.into_iter().map(|o| o.shape).collect::<Vec<_>>();
    assert_eq!(shapes(pixels(&|x, y| (-10..10).contains(&x) && (-3..3).contains(&y))), [None]);
    assert_eq!(shapes(pixels(&|x, y| (30..100).contains(&(x * x + y * y)))), [None]);
    assert_eq!(shapes(pixels(&|x, y| x.abs().min(y.abs()) < 2 && x.abs().max(y.abs()) < 9)), [None]);
    assert_eq!(shapes(pixels(&|x, y| x.abs().max(y.abs()) < 7)), [Some(Shape::Square)]);
    // A right-angled triangle with equal legs is no equilateral one, but near enough; one with legs 20 and 8 is none.
    assert_eq!(shapes(pixels(&|x, y| x >= -10 && y >= -4 && 2 * x + 5 * y < 0)), [None]);
}

#[test]
fn a_wrong_fact_changes_the_prompt_in_one_place() {
    for text in ["a circle", "three red squares", "a red circle and a blue square", "two circles above a triangle"] {
        let said = prompt(text);
        let others: BTreeSet<ShapesPrompt> = (0..2000).map(|i| said.with_a_wrong_fact(style(i))).collect();
        assert!(!others.contains(&said), "{text}");
        for other in &others {
            let groups: Vec<_> = said.groups().zip(other.groups()).collect();
            let changes: usize = groups
                .iter()
                .map(|(a, b)| {
                    usize::from(a.count != b.count)
                        + usize::from(a.shape != b.shape)
                        + usize::from(a.colour != b.colour)
                })
                .sum();
            let relation = |p: &ShapesPrompt| p.second.map(|(relation, _)| relation);
            let swapped = changes == 2 && groups.len() == 2 && groups[0].0.colour == groups[1].1.colour;
            let missing = said.second.is_some() && other.second.is_none() && changes == 0;
            let related = changes == 0 && relation(&said) != relation(other) && !missing;
            assert!(
                changes == 1 && relation(&said) == relation(other) || swapped || missing || related,
                "{text}: {other}"
            );
            assert_eq!(prompt(&other.to_string()), *other, "it can be said");
        }
        let most = if said.second.is_some() { 2 } else { 4 };
        let counts: BTreeSet<_> = others.iter().map(|other| other.first.count).collect();
        assert_eq!(counts, (1..=most).collect(), "{text}");
    }
}
