//! A disk as a grid of characters: every cell is an equal share of it.

use crate::{extent::Extents, report::sizes, segment::Content};
use std::fmt::Write as _;

/// Smallest share of a cell in bytes: a filter's cluster. Less could never differ.
const SMALLEST: u64 = 64 << 10;
/// Width of the offsets at the left, with the space behind.
const MARGIN: usize = 11;

/// How a grid is drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    /// Columns of the terminal.
    pub width: usize,
    /// Lines at most.
    pub lines: usize,
    /// Which characters.
    pub characters: Characters,
    /// Whether colours tell the kinds apart, too.
    pub colours: Colours,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Characters {
    Unicode,
    Ascii,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colours {
    Ansi,
    None,
}

/// Bytes of a cell by what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    data: u64,
    zero: u64,
    clean: u64,
}

impl Cell {
    fn total(self) -> u64 {
        self.data + self.zero + self.clean
    }
}

/// Cell `n` of `count` is the bytes from `size * n / count` to `size * (n + 1) / count`.
fn cells(content: &Extents<Content>, count: u64) -> Vec<Cell> {
    let size = content.size();
    let edge = |n: u64| (u128::from(size) * u128::from(n) / u128::from(count.max(1))) as u64;
    let mut cells = vec![Cell::default(); usize::try_from(count).unwrap_or_default()];
    let mut n = 0;
    for extent in content {
        let mut at = extent.offset;
        while at < extent.end() && n < count {
            let end = extent.end().min(edge(n + 1));
            let cell = &mut cells[n as usize];
            match extent.state {
                Content::Data => cell.data += end - at,
                Content::Zero => cell.zero += end - at,
                Content::Clean => cell.clean += end - at,
            }
            at = end;
            if at == edge(n + 1) {
                n += 1;
            }
        }
    }
    cells
}

/// The character and the colour (ANSI SGR) of a cell. Any data at all shows, and only a cell of nothing but data looks full.
fn character(cell: Cell, characters: Characters) -> (char, &'static str) {
    const EIGHTHS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    const NINTHS: [char; 10] = ['1', '2', '3', '4', '5', '6', '7', '8', '9', '#'];
    let ramp: &[char] = if characters == Characters::Unicode { &EIGHTHS } else { &NINTHS };
    if cell.data > 0 {
        let last = ramp.len() - 1;
        let step = if cell.data == cell.total() {
            last
        } else {
            (u128::from(cell.data) * last as u128 / u128::from(cell.total())) as usize
        };
        (ramp[step.min(last)], "33")
    } else if cell.zero > 0 {
        (if characters == Characters::Unicode { '░' } else { 'z' }, "36")
    } else {
        (if characters == Characters::Unicode { '·' } else { '.' }, "2")
    }
}

/// The grid, with the offset of each line's first cell at its left, and what the characters mean.
pub(super) fn render(content: &Extents<Content>, style: Style) -> String {
    let columns = style.width.saturating_sub(MARGIN).clamp(8, 512);
    let most = (columns * style.lines.max(1)) as u64;
    let count = content.size().div_ceil(SMALLEST).clamp(1, most);
    let cells = cells(content, count);
    let mut text = String::new();
    for (line, row) in cells.chunks(columns).enumerate() {
        let first = (u128::from(content.size()) * (line * columns) as u128 / u128::from(count)) as u64;
        let _ = write!(text, "{:>width$} ", sizes::bytes(first), width = MARGIN - 1);
        let mut colour = "";
        for cell in row {
            let (character, own) = character(*cell, style.characters);
            if style.colours == Colours::Ansi && own != colour {
                let _ = write!(text, "\x1b[0;{own}m");
                colour = own;
            }
            text.push(character);
        }
        text.push_str(if colour.is_empty() { "\n" } else { "\x1b[0m\n" });
    }
    let share = sizes::short_bytes(content.size().div_ceil(count));
    let legend = match style.characters {
        Characters::Unicode => "▁…█ data to be read, ░ zeroes, · clean",
        Characters::Ascii => "1…9 # data to be read, z zeroes, . clean",
    };
    let _ = writeln!(text, "{:MARGIN$}a cell is {share}: {}", "", legend.replace('…', ellipsis(style.characters)));
    text
}

fn ellipsis(characters: Characters) -> &'static str {
    if characters == Characters::Unicode { "…" } else { "-" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use proptest::prelude::*;

    const UNIT: u64 = SMALLEST;

    fn map(list: &[(u64, Content)]) -> Extents<Content> {
        let mut offset = 0;
        let extents: Vec<_> = list
            .iter()
            .map(|(len, state)| {
                offset += len;
                Extent { offset: offset - len, len: *len, state: *state }
            })
            .collect();
        Extents::from_ordered(offset, extents).unwrap()
    }

    fn style(width: usize, lines: usize, characters: Characters) -> Style {
        Style { width, lines, characters, colours: Colours::None }
    }

    #[test]
    fn a_small_disk_has_a_cell_for_every_cluster() {
        let content = map(&[(UNIT, Content::Data), (2 * UNIT, Content::Clean), (UNIT, Content::Zero)]);
        let text = render(&content, style(80, 10, Characters::Unicode));
        assert_eq!(text, "       0 B █··░\n           a cell is 64 KiB: ▁…█ data to be read, ░ zeroes, · clean\n");
        let text = render(&content, style(80, 10, Characters::Ascii));
        assert!(text.starts_with("       0 B #..z\n") && text.is_ascii(), "{text}");
    }

    #[test]
    fn a_large_disk_fills_the_terminal_and_every_cell_shows_its_share() {
        // 2 lines of 8 cells of 8 clusters each.
        let content = map(&[
            (8 * UNIT, Content::Data),
            (4 * UNIT, Content::Data),
            (4 * UNIT, Content::Clean),
            (1, Content::Data),
            (48 * UNIT - 1, Content::Clean),
            (56 * UNIT, Content::Zero),
            (8 * UNIT - 1, Content::Data),
            (1, Content::Zero),
        ]);
        let text = render(&content, style(MARGIN + 8, 2, Characters::Ascii));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "       0 B #51.....");
        assert_eq!(lines[1], "   4.0 MiB zzzzzzz9");
        assert!(lines[2].contains("a cell is 512 KiB"), "{text}");
    }

    #[test]
    fn colours_change_nothing_but_the_colours() {
        let content = map(&[(UNIT, Content::Data), (UNIT, Content::Clean)]);
        let plain = style(80, 10, Characters::Unicode);
        let coloured = render(&content, Style { colours: Colours::Ansi, ..plain });
        assert_eq!(coloured.lines().next(), Some("       0 B \x1b[0;33m█\x1b[0;2m·\x1b[0m"));
        let stripped = coloured.replace("\x1b[0;33m", "").replace("\x1b[0;2m", "").replace("\x1b[0m", "");
        assert_eq!(stripped, render(&content, plain));
    }

    #[test]
    fn an_empty_disk_is_drawn_without_trouble() {
        assert!(render(&Extents::uniform(0, Content::Data), style(0, 0, Characters::Ascii)).contains("0 B"));
    }

    proptest! {
        #[test]
        fn no_byte_is_lost_or_counted_twice(
            list in prop::collection::vec((1u64..5 * UNIT, 0u8..3), 1..40),
            count in 1u64..200,
        ) {
            let list: Vec<_> = list
                .into_iter()
                .map(|(len, state)| (len, [Content::Data, Content::Zero, Content::Clean][usize::from(state)]))
                .collect();
            let content = map(&list);
            let cells = cells(&content, count);
            let sum = |of: fn(&Cell) -> u64| cells.iter().map(of).sum::<u64>();
            prop_assert_eq!(sum(|c| c.data), content.bytes_where(|c| c == Content::Data));
            prop_assert_eq!(sum(|c| c.zero), content.bytes_where(|c| c == Content::Zero));
            prop_assert_eq!(sum(|c| c.clean), content.bytes_where(|c| c == Content::Clean));
            let (least, most) = (content.size() / count, content.size() / count + 1);
            prop_assert!(cells.iter().all(|c| (least..=most).contains(&c.total())));
        }
    }
}
