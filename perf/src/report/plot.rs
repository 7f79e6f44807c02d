//! Plots as SVG, drawn by plotters.
//!
//! Ink and grid are drawn in two colours of their own, which are then replaced by the page's, so that a plot is readable on
//! light and dark alike. The lines' colours are those of Okabe and Ito, which most people can tell apart.

use plotters::prelude::*;

/// Stands for the page's ink until the plot is drawn.
const INK: RGBColor = RGBColor(1, 2, 3);
/// Stands for the page's lines.
const GRID: RGBColor = RGBColor(1, 2, 4);
/// Okabe and Ito's palette without black and yellow.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];
const WIDTH: u32 = 620;

/// A picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// What it shows.
    pub title: String,
    /// In which way.
    pub axis: Axis,
}

/// The kinds of pictures.
#[derive(Debug, Clone, PartialEq)]
pub enum Axis {
    /// A value for each of a few names, with its spread.
    Bars {
        /// Of the values.
        unit: String,
        /// From top to bottom.
        bars: Vec<Bar>,
    },
    /// Values over values.
    Lines {
        /// What goes to the right.
        x: String,
        /// What goes up.
        y: String,
        /// Whether each step to the right is ten times the one before.
        logarithmic: bool,
        /// The lines.
        lines: Vec<Line>,
    },
}

/// A value with its spread.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// Whose.
    pub name: String,
    /// Where the bar ends.
    pub value: f64,
    /// Where the whisker begins.
    pub from: f64,
    /// Where it ends.
    pub to: f64,
}

/// Points, joined.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Whose.
    pub name: String,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

impl Plot {
    /// Whether there is anything to draw.
    pub(super) fn has_points(&self) -> bool {
        match &self.axis {
            Axis::Bars { bars, .. } => !bars.is_empty(),
            Axis::Lines { lines, .. } => lines.iter().any(|line| !line.points.is_empty()),
        }
    }
}

/// The picture as an `<svg>` element.
pub(super) fn svg(plot: &Plot) -> Result<String, String> {
    let mut out = String::new();
    let drawn = match &plot.axis {
        Axis::Bars { unit, bars } => draw_bars(&mut out, &plot.title, unit, bars),
        Axis::Lines {
            x,
            y,
            logarithmic,
            lines,
        } => draw_lines(&mut out, &plot.title, [x, y], *logarithmic, lines),
    };
    drawn.map_err(|error| error.to_string())?;
    // Inside a page, the element needs no name space; it gets the page's colours.
    let out = out
        .replace(" xmlns=\"http://www.w3.org/2000/svg\"", "")
        .replace("#010203", "currentColor")
        .replace("#010204", "var(--line)");
    Ok(out)
}

type Drawn<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn ink(size: u32) -> TextStyle<'static> {
    let size = f64::from(size);
    ("sans-serif", size).into_font().color(&INK)
}

fn draw_bars<'a>(out: &'a mut String, title: &str, unit: &str, bars: &[Bar]) -> Drawn<'a> {
    let count = u32::try_from(bars.len()).unwrap_or(u32::MAX);
    let height = 110_u32.saturating_add(count.saturating_mul(34));
    let area = SVGBackend::with_string(out, (WIDTH, height)).into_drawing_area();
    let most = bars
        .iter()
        .map(|bar| bar.to.max(bar.value))
        .fold(0.0, f64::max);
    let rows = f64::from(count);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ink(20))
        .margin(10)
        .margin_right(25)
        .x_label_area_size(40)
        .y_label_area_size(170)
        .build_cartesian_2d(0.0..positive(most * 1.05), 0.0..rows)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .y_labels(0)
        .x_labels(6)
        .x_desc(unit)
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(ink(16))
        .axis_desc_style(ink(16))
        .draw()?;
    let left = chart.plotting_area().get_x_axis_pixel_range().start;
    for (at, bar) in bars.iter().enumerate() {
        let row = rows - f64::from(u32::try_from(at).unwrap_or(u32::MAX)) - 0.5;
        let colour = COLOURS[at % COLOURS.len()];
        chart.draw_series([Rectangle::new(
            [(0.0, row - 0.3), (bar.value, row + 0.3)],
            colour.filled(),
        )])?;
        let whisker = vec![(bar.from, row), (bar.to, row)];
        chart.draw_series([PathElement::new(whisker, INK.stroke_width(2))])?;
        let (_, y) = chart.backend_coord(&(0.0, row));
        let name = ink(16).pos(plotters::style::text_anchor::Pos::new(
            plotters::style::text_anchor::HPos::Right,
            plotters::style::text_anchor::VPos::Center,
        ));
        area.draw_text(&bar.name, &name, (left - 8, y))?;
    }
    drop(chart);
    area.present()
}

fn draw_lines<'a>(
    out: &'a mut String,
    title: &str,
    [x_title, y_title]: [&str; 2],
    logarithmic: bool,
    lines: &[Line],
) -> Drawn<'a> {
    let area = SVGBackend::with_string(out, (WIDTH, 360)).into_drawing_area();
    let points = || lines.iter().flat_map(|line| &line.points);
    let right = points().map(|(x, _)| *x).fold(0.0, f64::max);
    let left = points().map(|(x, _)| *x).fold(right, f64::min);
    let top = positive(points().map(|(_, y)| *y).fold(0.0, f64::max) * 1.1);
    let mut builder = ChartBuilder::on(&area);
    builder
        .caption(title, ink(20))
        .margin(10)
        .margin_right(25)
        .x_label_area_size(40)
        .y_label_area_size(70);
    // The two kinds of axes are different types all the way down.
    macro_rules! draw {
        ($chart:expr) => {{
            let mut chart = $chart;
            chart
                .configure_mesh()
                .x_desc(x_title)
                .y_desc(y_title)
                .x_labels(8)
                .y_labels(6)
                .x_label_formatter(&|x| short(*x))
                .y_label_formatter(&|y| short(*y))
                .axis_style(INK)
                .bold_line_style(GRID)
                .light_line_style(TRANSPARENT)
                .label_style(ink(16))
                .axis_desc_style(ink(16))
                .draw()?;
            for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
                let colour = *colour;
                chart
                    .draw_series(LineSeries::new(
                        line.points.iter().copied(),
                        colour.stroke_width(2),
                    ))?
                    .label(&line.name)
                    .legend(move |(x, y)| {
                        PathElement::new(vec![(x, y), (x + 16, y)], colour.stroke_width(2))
                    });
                chart.draw_series(
                    line.points
                        .iter()
                        .map(|point| Circle::new(*point, 3, colour.filled())),
                )?;
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::LowerRight)
                .label_font(ink(16))
                .draw()?;
        }};
    }
    if logarithmic {
        let left = if left > 0.0 { left } else { 1.0 };
        let right = if right > left { right } else { left * 10.0 };
        draw!(builder.build_cartesian_2d((left..right).log_scale(), 0.0..top)?);
    } else {
        draw!(builder.build_cartesian_2d(0.0..positive(right), 0.0..top)?);
    }
    area.present()
}

/// An axis has to have a length.
fn positive(value: f64) -> f64 {
    if value > 0.0 { value } else { 1.0 }
}

/// `100000` as `100k`.
fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e3 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{value:.2}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}
