//! What is wrong at the moment: each problem is logged when it appears and when it goes, not in every round.

use std::collections::BTreeMap;

/// Standing problems by the part that has them.
#[derive(Debug, Default)]
pub struct Problems {
    standing: BTreeMap<&'static str, String>,
}

impl Problems {
    /// `part` has this problem, or a new one instead of the one before.
    pub fn raise(&mut self, part: &'static str, problem: String) {
        if self.standing.get(part) != Some(&problem) {
            tracing::error!(part, "{problem}");
            self.standing.insert(part, problem);
        }
    }

    /// `part` works.
    pub fn clear(&mut self, part: &'static str) {
        if self.standing.remove(part).is_some() {
            tracing::info!(part, "works again");
        }
    }

    /// Whether `part` has a problem.
    pub fn is_standing(&self, part: &str) -> bool {
        self.standing.contains_key(part)
    }

    /// All of them.
    pub fn list(&self) -> Vec<String> {
        self.standing.values().cloned().collect()
    }

    /// All of them, with the parts.
    pub fn with_parts(&self) -> Vec<(&'static str, String)> {
        let standing = self.standing.iter();
        standing
            .map(|(part, problem)| (*part, problem.clone()))
            .collect()
    }
}
