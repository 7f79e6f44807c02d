//! JSON text as Go's `encoding/json` writes a map: keys sorted, no spaces, numbers as 64-bit floats, `<`, `>`, `&` and the
//! line separators escaped. flannel's plugin saves such text, and its bytes are compared.

use std::collections::BTreeMap;

use serde_json::{Number, Value};

/// Any value.
pub(crate) fn encode(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => encode_number(number),
        Value::String(text) => encode_string(text),
        Value::Array(values) => array(values.iter().map(encode)),
        Value::Object(map) => object(
            &map.iter()
                .map(|(key, value)| (key.clone(), encode(value)))
                .collect(),
        ),
    }
}

/// An object of values that are encoded already.
pub(crate) fn object(map: &BTreeMap<String, String>) -> String {
    let members = map
        .iter()
        .map(|(key, value)| format!("{}:{value}", encode_string(key)));
    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
}

/// An array of values that are encoded already.
pub(crate) fn array(values: impl Iterator<Item = String>) -> String {
    format!("[{}]", values.collect::<Vec<_>>().join(","))
}

/// Go keeps every number of a map as a 64-bit float and writes it without exponent from 1e-6 to below 1e21.
fn encode_number(number: &Number) -> String {
    let Some(value) = number.as_f64() else {
        return number.to_string();
    };
    if value == 0.0 || (1e-6..1e21).contains(&value.abs()) {
        return value.to_string();
    }
    let text = format!("{value:e}");
    match text.split_once('e') {
        Some((digits, exponent)) if !exponent.starts_with('-') => format!("{digits}e+{exponent}"),
        Some(_) | None => text,
    }
}

fn encode_string(text: &str) -> String {
    let mut encoded = Value::from(text).to_string();
    for (character, escape) in [
        ('<', r"\u003c"),
        ('>', r"\u003e"),
        ('&', r"\u0026"),
        ('\u{2028}', r"\u2028"),
        ('\u{2029}', r"\u2029"),
    ] {
        if encoded.contains(character) {
            encoded = encoded.replace(character, escape);
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_as_go_writes_them() {
        for (json, expected) in [
            (
                r#"{"b": [1, {"z": null, "a": true}], "a": {}, "B": []}"#,
                r#"{"B":[],"a":{},"b":[1,{"a":true,"z":null}]}"#,
            ),
            ("[0, -0.0, 1450, 1.0, 1.5, -7]", "[0,-0,1450,1,1.5,-7]"),
            (
                "[12345678901234567890, 1e20, 1e21, 1.5e300, 0.000001, 0.0000001]",
                "[12345678901234567000,100000000000000000000,1e+21,1.5e+300,0.000001,1e-7]",
            ),
            (
                "\"<a href='x'>&\\u2028\\u2029 \\\" \\\\ \\/ \\n\\u0001\\u007f é\"",
                "\"\\u003ca href='x'\\u003e\\u0026\\u2028\\u2029 \\\" \\\\ / \\n\\u0001\u{7f} é\"",
            ),
        ] {
            let value: Value = serde_json::from_str(json).unwrap();
            assert_eq!(encode(&value), expected);
        }
    }
}
