//! Tables as lines of text that leave their least important columns out where there is no room, and short numbers.

use core::time::Duration;

use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};

/// How a column's cells are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    pub(crate) title: &'static str,
    pub(crate) align: Align,
    /// Least width: numbers that grow and shrink do not move the columns behind them.
    pub(crate) width_min: usize,
    /// Columns of a higher rank go first where there is no room.
    pub(crate) rank: u8,
}

/// A table that has been laid out.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) head: Line<'static>,
    pub(crate) rows: Vec<Line<'static>>,
}

const GAP: usize = 2;

/// A cell.
pub(crate) fn cell(text: impl Into<String>) -> Span<'static> {
    // Names come from memory that may be damaged.
    let text: String = text.into();
    let printable = |letter: char| if letter.is_control() { '?' } else { letter };
    Span::raw(text.chars().map(printable).collect::<String>())
}

/// Lays cells out below their columns' titles, in `width` cells of the terminal if that is given.
pub(crate) fn lay_out(
    columns: &[Column],
    rows: &[Vec<Span<'static>>],
    width: Option<usize>,
) -> Table {
    let width_of = |(index, column): (usize, &Column)| {
        let cells = rows.iter().filter_map(|row| row.get(index));
        let widest = cells.map(Span::width).max().unwrap_or(0);
        widest.max(column.width_min).max(column.title.len())
    };
    let widths: Vec<usize> = columns.iter().enumerate().map(width_of).collect();
    let mut by_rank: Vec<usize> = (0..columns.len()).collect();
    by_rank.sort_by_key(|&index| columns[index].rank);
    let mut room = width.unwrap_or(usize::MAX);
    let mut kept = vec![false; columns.len()];
    for (place, index) in by_rank.into_iter().enumerate() {
        // The first is shown as far as it goes.
        if widths[index] > room && place > 0 {
            break;
        }
        kept[index] = true;
        room = room.saturating_sub(widths[index] + GAP);
    }
    let line = |cells: &[Span<'static>], style: Style| {
        let mut spans = Vec::with_capacity(3 * cells.len());
        for (index, cell) in cells.iter().enumerate().filter(|(index, _)| kept[*index]) {
            let padding = Span::raw(" ".repeat(widths[index].saturating_sub(cell.width())));
            let cell = cell.clone();
            spans.extend(match columns[index].align {
                Align::Left => [cell, padding],
                Align::Right => [padding, cell],
            });
            spans.push(Span::raw(" ".repeat(GAP)));
        }
        Line::from(spans).style(style)
    };
    let titles: Vec<_> = columns.iter().map(|column| cell(column.title)).collect();
    Table {
        head: line(&titles, Style::new().add_modifier(Modifier::DIM)),
        rows: rows.iter().map(|row| line(row, Style::new())).collect(),
    }
}

/// A number in at most five characters: `0.3`, `42`, `1.25k`, `640M`; `-` where there is none.
pub(crate) fn short(number: Option<f64>) -> String {
    let Some(mut number) = number else {
        return "-".to_owned();
    };
    if number == 0.0 {
        return "0".to_owned();
    }
    if number < 0.05 {
        return "<0.1".to_owned();
    }
    let mut suffixes = ["", "k", "M", "G", "T", "P", "E"].into_iter();
    let mut suffix = suffixes.next().unwrap_or_default();
    // Rounded, so that 999.6 is not 1000.
    while number >= 999.5 {
        let Some(next) = suffixes.next() else { break };
        (number, suffix) = (number / 1000.0, next);
    }
    let is_whole = suffix.is_empty() && (number >= 9.95 || number.fract() == 0.0);
    let digits = match (is_whole, suffix.is_empty()) {
        (true, _) => 0,
        (false, true) => 1,
        (false, false) if number < 9.995 => 2,
        (false, false) if number < 99.95 => 1,
        (false, false) => 0,
    };
    format!("{number:.digits$}{suffix}")
}

/// A share in percent.
pub(crate) fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", 100.0 * share))
}

/// A number with thousands separated: `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time in one unit: `3ms`, `12s`, `5m`, `2h`, `9d`.
pub(crate) fn age(ms: u64) -> String {
    for (unit_ms, name) in [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "m"),
        (1000, "s"),
    ] {
        if ms >= unit_ms {
            return format!("{}{name}", ms / unit_ms);
        }
    }
    format!("{ms}ms")
}

/// A time as people write it: `0.5 s`, `10 s`.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (None, "-"),
            (Some(0.0), "0"),
            (Some(0.001), "<0.1"),
            (Some(0.25), "0.2"),
            (Some(7.0), "7"),
            (Some(9.94), "9.9"),
            (Some(9.96), "10"),
            (Some(999.4), "999"),
            (Some(999.6), "1.00k"),
            (Some(12_345.0), "12.3k"),
            (Some(999_499.0), "999k"),
            (Some(1_250_000.0), "1.25M"),
            (Some(1.8e19), "18.0E"),
        ] {
            assert_eq!(short(number), text);
        }
        assert_eq!([percent(None), percent(Some(0.996))], ["-", "100%"]);
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!([age(999), age(61_000)], ["999ms", "1m"]);
        assert_eq!(seconds(Duration::from_millis(500)), "0.5 s");
    }

    #[test]
    fn columns_go_by_rank_where_there_is_no_room() {
        let column = |title, align, rank| Column {
            title,
            align,
            width_min: 4,
            rank,
        };
        let columns = [
            column("NAME", Align::Left, 0),
            column("MORE", Align::Left, 2),
            column("N", Align::Right, 1),
        ];
        let rows = [vec![cell("a\x1b[b"), cell("much"), cell("12")]];
        let shown = |width| {
            let table = lay_out(&columns, &rows, width);
            let lines = [&table.head, &table.rows[0]];
            lines.map(|line| line.to_string().trim_end().to_owned())
        };
        assert_eq!(shown(None), ["NAME  MORE     N", "a?[b  much    12"]);
        assert_eq!(shown(Some(16)), shown(None));
        assert_eq!(shown(Some(15)), ["NAME     N", "a?[b    12"]);
        assert_eq!(shown(Some(9)), ["NAME", "a?[b"]);
        assert_eq!(shown(Some(0)), ["NAME", "a?[b"]);
    }
}
