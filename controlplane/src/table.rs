//! Aligned text tables for people.

/// How a column's cells are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Lays out rows under a header line, columns two spaces apart.
pub fn render(columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let width = |index: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(index))
            .map(|cell| cell.chars().count());
        let header = columns
            .get(index)
            .map_or(0, |(title, _)| title.chars().count());
        cells.chain([header]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for ((cell, width), (_, align)) in cells.zip(&widths).zip(columns) {
            let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
            match align {
                Align::Left => out.extend([cell, &padding, "  "]),
                Align::Right => out.extend([padding.as_str(), cell, "  "]),
            }
        }
        text.push_str(out.trim_end());
        text.push('\n');
    };
    line(&mut columns.iter().map(|(title, _)| *title));
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
    text
}

/// A number with thousands separated: `1,234,567`.
pub fn grouped(number: u64) -> String {
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

/// A rate in a short form: `1.25M`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn scaled(number: u64) -> String {
    for (unit, suffix) in [(1_000_000_000, "G"), (1_000_000, "M"), (10_000, "k")] {
        if number >= unit {
            let divisor = if suffix == "k" { 1_000 } else { unit };
            return format!("{:.2}{suffix}", number as f64 / divisor as f64);
        }
    }
    number.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = vec![
            vec!["a".to_owned(), "1".to_owned()],
            vec!["long".to_owned(), "200".to_owned()],
        ];
        let text = render(&[("NAME", Align::Left), ("N", Align::Right)], &rows);
        assert_eq!(text, "NAME    N\na       1\nlong  200\n");
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(scaled(9_999), "9999");
        assert_eq!(scaled(12_340), "12.34k");
        assert_eq!(scaled(1_250_000), "1.25M");
    }
}
