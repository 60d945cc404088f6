//! From a map of text to boxes around lines of it: what PaddleOCR does behind its detector (ppocr/postprocess/
//! db_postprocess.py of 2.9: threshold 0.3, box threshold 0.6, unclip 1.5).

/// A pixel belongs to text above this.
const THRESHOLD: f32 = 0.3;
/// A box is text if the map's mean inside it is as high as this.
const BOX_THRESHOLD: f32 = 0.6;
/// How much larger a line is than the detector's shrunk map of it.
const UNCLIP: f64 = 1.5;
/// The least short side of a box, in pixels, before and after it is enlarged.
const LEAST_SIDE: f64 = 3.0;
const LEAST_SIDE_UNCLIPPED: f64 = LEAST_SIDE + 2.0;
/// Boxes whose upper corners differ by less are in one line, from left to right.
const SAME_LINE: f64 = 10.0;

/// A rectangle that may be turned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct TextBox {
    /// Its middle.
    pub centre: [f64; 2],
    /// Length of the side along `along`, and of the other one.
    pub size: [f64; 2],
    /// Where its text runs: a direction of length 1.
    pub along: [f64; 2],
}

impl TextBox {
    /// The place at (u, v) of the box, each from 0 to 1, in pixels.
    pub fn at(&self, u: f64, v: f64) -> [f64; 2] {
        let (x, y) = ((u - 0.5) * self.size[0], (v - 0.5) * self.size[1]);
        let [ax, ay] = self.along;
        [self.centre[0] + x * ax - y * ay, self.centre[1] + x * ay + y * ax]
    }

    fn contains(&self, x: f64, y: f64) -> bool {
        let (dx, dy) = (x - self.centre[0], y - self.centre[1]);
        let [ax, ay] = self.along;
        (dx * ax + dy * ay).abs() <= self.size[0] / 2.0 && (dy * ax - dx * ay).abs() <= self.size[1] / 2.0
    }

    /// Grown on every side by `area * UNCLIP / perimeter`.
    fn unclipped(self) -> TextBox {
        let [w, h] = self.size;
        let distance = w * h * UNCLIP / (2.0 * (w + h));
        TextBox { size: [w + 2.0 * distance, h + 2.0 * distance], ..self }
    }

    /// The smallest and largest pixel that it touches, within a map of that size.
    fn extent(&self, width: usize, height: usize) -> ([usize; 2], [usize; 2]) {
        let corners = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)].map(|(u, v)| self.at(u, v));
        let last = [width - 1, height - 1];
        let edge = |axis: usize, end: fn(f64, f64) -> f64| {
            let value = corners.iter().map(|corner| corner[axis]).reduce(end).unwrap_or(0.0);
            value.clamp(0.0, last[axis] as f64)
        };
        let first = [0, 1].map(|axis| edge(axis, f64::min).floor() as usize);
        let end = [0, 1].map(|axis| edge(axis, f64::max).ceil() as usize);
        (first, end)
    }
}

/// The boxes of text in a map `[height, width]` of probabilities, in reading order, in the map's pixels.
pub(super) fn text_boxes(map: &[f32], width: usize) -> Vec<TextBox> {
    let height = map.len() / width;
    let mut boxes: Vec<TextBox> = components(map, width)
        .iter()
        .filter_map(|pixels| {
            let found = smallest_rectangle(pixels);
            let text = found.size[0].min(found.size[1]) >= LEAST_SIDE && mean(map, width, &found) >= BOX_THRESHOLD;
            text.then(|| found.unclipped()).filter(|grown| grown.size[0].min(grown.size[1]) >= LEAST_SIDE_UNCLIPPED)
        })
        .map(|found| upright(found, width, height))
        .collect();
    in_reading_order(&mut boxes);
    boxes
}

/// The pixels above the threshold, in pieces that hang together by sides or corners.
fn components(map: &[f32], width: usize) -> Vec<Vec<[f64; 2]>> {
    let height = map.len() / width;
    let mut seen: Vec<bool> = map.iter().map(|&value| value <= THRESHOLD).collect();
    let mut all = Vec::new();
    for start in 0..map.len() {
        if seen[start] {
            continue;
        }
        seen[start] = true;
        let (mut open, mut pixels) = (vec![start], Vec::new());
        while let Some(at) = open.pop() {
            let (x, y) = (at % width, at / width);
            pixels.push([x as f64, y as f64]);
            for ny in y.saturating_sub(1)..(y + 2).min(height) {
                for nx in x.saturating_sub(1)..(x + 2).min(width) {
                    let next = ny * width + nx;
                    if !seen[next] {
                        seen[next] = true;
                        open.push(next);
                    }
                }
            }
        }
        all.push(pixels);
    }
    all
}

/// The rectangle of least area around the points, by the direction of one side of their hull.
fn smallest_rectangle(points: &[[f64; 2]]) -> TextBox {
    let hull = hull(points);
    let around = |along: [f64; 2]| {
        let range = |axis: [f64; 2]| {
            let values = hull.iter().map(|p| p[0] * axis[0] + p[1] * axis[1]);
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
        };
        let [ax, ay] = along;
        let ((left, right), (top, bottom)) = (range(along), range([-ay, ax]));
        let (u, v) = ((left + right) / 2.0, (top + bottom) / 2.0);
        TextBox { centre: [u * ax - v * ay, u * ay + v * ax], size: [right - left, bottom - top], along }
    };
    let sides = hull.iter().zip(hull.iter().cycle().skip(1)).filter_map(|(a, b)| {
        let length = (b[0] - a[0]).hypot(b[1] - a[1]);
        (length > 0.0).then(|| [(b[0] - a[0]) / length, (b[1] - a[1]) / length])
    });
    let area = |found: &TextBox| found.size[0] * found.size[1];
    let smallest = sides.map(around).min_by(|a, b| area(a).total_cmp(&area(b)));
    smallest.unwrap_or_else(|| around([1.0, 0.0]))
}

/// The convex hull, by Andrew's monotone chain.
fn hull(points: &[[f64; 2]]) -> Vec<[f64; 2]> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let half = |points: &mut dyn Iterator<Item = [f64; 2]>| {
        let mut chain: Vec<[f64; 2]> = Vec::new();
        for p in points {
            while let [.., a, b] = chain[..]
                && (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) <= 0.0
            {
                chain.pop();
            }
            chain.push(p);
        }
        chain
    };
    let mut lower = half(&mut sorted.iter().copied());
    let mut upper = half(&mut sorted.iter().rev().copied());
    lower.pop();
    upper.pop();
    lower.extend(upper);
    if lower.is_empty() { sorted } else { lower }
}

/// The mean of the map over the pixels whose middle lies in the box.
fn mean(map: &[f32], width: usize, found: &TextBox) -> f32 {
    let ([left, top], [right, bottom]) = found.extent(width, map.len() / width);
    let (mut sum, mut count) = (0.0, 0);
    for y in top..=bottom {
        for x in left..=right {
            if found.contains(x as f64, y as f64) {
                sum += map[y * width + x];
                count += 1;
            }
        }
    }
    if count == 0 { 0.0 } else { sum / count as f32 }
}

/// The same box with its text running rightwards, along the longer side; downwards where it is much higher than wide,
/// to be read turned. Cut to the map if it stands straight.
fn upright(found: TextBox, width: usize, height: usize) -> TextBox {
    let TextBox { centre, size, along } = found;
    // Of the four directions of its sides the one that points right.
    let [ax, ay] = along;
    let (mut along, mut size) = if ax.abs() >= ay.abs() { (along, size) } else { ([-ay, ax], [size[1], size[0]]) };
    if along[0] < 0.0 {
        along = [-along[0], -along[1]];
    }
    if size[1] >= 1.5 * size[0] {
        // A column is read downwards, as PaddleOCR turns it.
        (along, size) = ([-along[1], along[0]], [size[1], size[0]]);
    }
    let mut found = TextBox { centre, size, along };
    if along == [1.0, 0.0] {
        for (axis, last) in [width - 1, height - 1].into_iter().enumerate() {
            let (low, high) = (centre[axis] - size[axis] / 2.0, centre[axis] + size[axis] / 2.0);
            let (low, high) = (low.max(0.0), high.min(last as f64));
            (found.centre[axis], found.size[axis]) = ((low + high) / 2.0, high - low);
        }
    }
    found
}

/// From top to bottom, and what is about as high from left to right.
fn in_reading_order(boxes: &mut [TextBox]) {
    let corner = |found: &TextBox| found.at(0.0, 0.0);
    boxes.sort_by(|a, b| {
        let ([ax, ay], [bx, by]) = (corner(a), corner(b));
        ay.total_cmp(&by).then(ax.total_cmp(&bx))
    });
    for end in 1..boxes.len() {
        for i in (1..=end).rev() {
            let ([ax, ay], [bx, by]) = (corner(&boxes[i - 1]), corner(&boxes[i]));
            if (by - ay).abs() < SAME_LINE && bx < ax {
                boxes.swap(i - 1, i);
            } else {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map with rectangles (centre, size, turned by degrees) of a value.
    fn map(width: usize, height: usize, pieces: &[([f64; 2], [f64; 2], f64, f32)]) -> Vec<f32> {
        let mut map = vec![0.01; width * height];
        for &(centre, size, degrees, value) in pieces {
            let (sin, cos) = degrees.to_radians().sin_cos();
            let piece = TextBox { centre, size, along: [cos, sin] };
            for (i, pixel) in map.iter_mut().enumerate() {
                if piece.contains((i % width) as f64, (i / width) as f64) {
                    *pixel = value;
                }
            }
        }
        map
    }

    fn close(a: [f64; 2], b: [f64; 2], most: f64) -> bool {
        (a[0] - b[0]).abs() <= most && (a[1] - b[1]).abs() <= most
    }

    #[test]
    fn a_straight_line_is_found_and_enlarged() {
        // 61 x 11 pixels: 60 x 10 between their middles; grown by 60 * 10 * 1.5 / 140 = 6.43 on every side.
        let boxes = text_boxes(&map(128, 64, &[([60.0, 30.0], [60.0, 10.0], 0.0, 0.9)]), 128);
        assert_eq!(boxes.len(), 1);
        assert!(close(boxes[0].centre, [60.0, 30.0], 1e-9), "{boxes:?}");
        assert!(close(boxes[0].size, [72.857, 22.857], 1e-3), "{boxes:?}");
        assert_eq!(boxes[0].along, [1.0, 0.0]);
    }

    #[test]
    fn a_turned_line_is_found_along_its_direction() {
        let boxes = text_boxes(&map(200, 200, &[([100.0, 90.0], [80.0, 14.0], 25.0, 0.9)]), 200);
        assert_eq!(boxes.len(), 1);
        let [x, y] = boxes[0].along;
        assert!((y.atan2(x).to_degrees() - 25.0).abs() < 2.0, "{boxes:?}");
        assert!(close(boxes[0].centre, [100.0, 90.0], 1.0) && boxes[0].size[0] > 90.0, "{boxes:?}");
    }

    #[test]
    fn a_column_is_read_turned() {
        let boxes = text_boxes(&map(100, 200, &[([50.0, 100.0], [12.0, 90.0], 0.0, 0.9)]), 100);
        assert!(boxes.len() == 1 && boxes[0].size[0] > 100.0 && boxes[0].size[1] < 40.0, "{boxes:?}");
        assert!(close(boxes[0].along, [0.0, 1.0], 1e-9), "{boxes:?}");
    }

    #[test]
    fn what_is_faint_or_tiny_is_no_text() {
        let pieces = [([30.0, 30.0], [30.0, 8.0], 0.0, 0.5), ([30.0, 60.0], [30.0, 1.0], 0.0, 0.9)];
        assert_eq!(text_boxes(&map(100, 100, &pieces), 100), []);
        assert_eq!(text_boxes(&vec![0.0; 1024], 32), []);
    }

    #[test]
    fn boxes_come_in_reading_order() {
        let at = |x: f64, y: f64| ([x, y], [30.0, 8.0], 0.0, 0.9);
        let boxes = text_boxes(&map(200, 120, &[at(150.0, 30.0), at(50.0, 34.0), at(60.0, 80.0)]), 200);
        let centres: Vec<[f64; 2]> = boxes.iter().map(|found| found.centre).collect();
        assert_eq!(centres, [[50.0, 34.0], [150.0, 30.0], [60.0, 80.0]]);
    }

    #[test]
    fn points_on_a_line_or_alone_have_a_rectangle() {
        let line: Vec<[f64; 2]> = (0..5).map(|i| [f64::from(i), f64::from(i)]).collect();
        assert!((smallest_rectangle(&line).size[0] - 32f64.sqrt()).abs() < 1e-9);
        assert_eq!(smallest_rectangle(&[[3.0, 4.0]]).size, [0.0, 0.0]);
    }
}
