//! What is kept of a Node: a name, an age, the pod CIDRs and flannel's annotations; of our own, one condition as well.
//!
//! The whole object never exists here. A list is decoded while it arrives, node by node, however long it is, because an
//! API server that answers from its cache (`resourceVersion=0`) sends all nodes at once whatever the limit says.

use core::fmt;
use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::annotations::{Key, Prefix};

/// A Node as the API sends it, less what is of no interest.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct RawNode {
    metadata: RawMetadata,
    #[serde(default)]
    spec: Option<RawSpec>,
    #[serde(default)]
    status: Option<RawStatus>,
}

#[derive(Debug, Clone, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMetadata {
    name: String,
    #[serde(default)]
    resource_version: String,
    #[serde(default)]
    creation_timestamp: Option<String>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, serde::Deserialize)]
struct RawSpec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Debug, Clone, serde::Deserialize)]
struct RawStatus {
    #[serde(default)]
    conditions: Option<Vec<RawCondition>>,
}

#[derive(Debug, Clone, serde::Deserialize)]
struct RawCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    #[serde(default)]
    reason: Option<String>,
}

impl RawNode {
    /// The version of the world in which this is the node.
    pub fn resource_version(&self) -> &str {
        &self.metadata.resource_version
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.metadata.name
    }
}

/// What is kept of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// Creation time as the API writes it, which sorts as it reads.
    pub created: Box<str>,
    /// `spec.podCIDRs`, or `spec.podCIDR` alone; may be empty.
    pub pod_cidrs: Box<[Box<str>]>,
    /// Those of flannel's annotations that it has, by key.
    annotations: Box<[(Key, Box<str>)]>,
    /// Status and reason of the condition `NetworkUnavailable`; of our own node only.
    pub network_unavailable: Option<(Box<str>, Box<str>)>,
}

impl Node {
    /// Keeps what is of interest to node `own`.
    pub fn keep(raw: RawNode, prefix: &Prefix, own: &str) -> Self {
        let spec = raw.spec.unwrap_or(RawSpec {
            pod_cidr: None,
            pod_cidrs: None,
        });
        let mut pod_cidrs = spec.pod_cidrs.unwrap_or_default();
        if pod_cidrs.is_empty() {
            pod_cidrs.extend(spec.pod_cidr.filter(|cidr| !cidr.is_empty()));
        }
        let annotations = raw.metadata.annotations.unwrap_or_default().into_iter();
        let conditions = raw
            .status
            .and_then(|status| status.conditions)
            .unwrap_or_default();
        let mut conditions = conditions.into_iter().filter(|_| raw.metadata.name == own);
        let network_unavailable =
            conditions.find(|condition| condition.kind == NETWORK_UNAVAILABLE);
        Self {
            name: raw.metadata.name.into(),
            created: raw.metadata.creation_timestamp.unwrap_or_default().into(),
            pod_cidrs: pod_cidrs.into_iter().map(Box::from).collect(),
            annotations: annotations
                .filter_map(|(name, value)| Some((prefix.key(&name)?, value.into())))
                .collect(),
            network_unavailable: network_unavailable.map(|condition| {
                (
                    condition.status.into(),
                    condition.reason.unwrap_or_default().into(),
                )
            }),
        }
    }

    /// An annotation; none where it is missing.
    pub fn annotation(&self, key: Key) -> Option<&str> {
        let found = self.annotations.iter().find(|(known, _)| *known == key);
        found.map(|(_, value)| value.as_ref())
    }

    /// An annotation that says something.
    pub fn text(&self, key: Key) -> Option<&str> {
        self.annotation(key).filter(|text| !text.is_empty())
    }

    /// Whether the node takes part: flannel's way to say so.
    pub fn is_member(&self) -> bool {
        self.annotation(Key::SubnetManager) == Some("true")
    }
}

/// The condition that schedulers wait for.
pub const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// One page of a list.
#[derive(Debug, Default)]
pub struct Page {
    /// The version of the world that it shows.
    pub version: String,
    /// Where the next page begins, if there is one.
    pub more: Option<String>,
    /// The nodes.
    pub nodes: Vec<Node>,
}

/// Decodes a list as it arrives.
pub fn read_page(text: impl Read, prefix: &Prefix, own: &str) -> Result<Page, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_reader(text);
    let page = deserializer.deserialize_map(PageVisitor { prefix, own })?;
    deserializer.end()?;
    Ok(page)
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    more: Option<String>,
}

struct PageVisitor<'a> {
    prefix: &'a Prefix,
    own: &'a str,
}

impl<'de> Visitor<'de> for PageVisitor<'_> {
    type Value = Page;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of nodes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Page, A::Error> {
        let mut page = Page::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "metadata" => {
                    let metadata: ListMetadata = map.next_value()?;
                    page.version = metadata.resource_version;
                    page.more = metadata.more.filter(|token| !token.is_empty());
                }
                "items" => map.next_value_seed(Items {
                    visitor: &self,
                    nodes: &mut page.nodes,
                })?,
                _ => {
                    let _: IgnoredAny = map.next_value()?;
                }
            }
        }
        Ok(page)
    }
}

struct Items<'a, 'b> {
    visitor: &'a PageVisitor<'b>,
    nodes: &'a mut Vec<Node>,
}

impl<'de> DeserializeSeed<'de> for Items<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nodes")
    }

    /// Go writes an empty list as `null`.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let PageVisitor { prefix, own } = self.visitor;
        while let Some(raw) = items.next_element::<RawNode>()? {
            self.nodes.push(Node::keep(raw, prefix, own));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::annotations::DEFAULT_PREFIX;
    use super::*;

    fn page(text: &str) -> Result<Page, serde_json::Error> {
        read_page(text.as_bytes(), &Prefix::new(DEFAULT_PREFIX).unwrap(), "n1")
    }

    #[test]
    fn little_is_kept() {
        let condition = r#"{"conditions":[{"type":"Ready","status":"True"},{"type":"NetworkUnavailable","status":"True","reason":"NoRouteCreated"}],"images":[{}]}"#;
        let text = format!(
            r#"{{"kind":"NodeList","apiVersion":"v1","metadata":{{"resourceVersion":"7","continue":"abc"}},"items":[
            {{"metadata":{{"name":"n1","creationTimestamp":"2026-11-22T08:00:00Z","managedFields":[{{}}],"annotations":
              {{"flannel.alpha.coreos.com/public-ip":"10.0.0.1","other":"x"}}}},
              "spec":{{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24","fd00::/64"]}},"status":{condition}}},
            {{"metadata":{{"name":"n2","creationTimestamp":null,"annotations":null}},"spec":{{"podCIDR":"10.244.2.0/24"}},"status":{condition}}},
            {{"metadata":{{"name":"n3"}},"spec":{{"podCIDR":"","podCIDRs":null}}}}]}}"#
        );
        let page = page(&text).unwrap();
        assert_eq!(
            (page.version.as_str(), page.more.as_deref()),
            ("7", Some("abc"))
        );
        let [n1, n2, n3] = &page.nodes[..] else {
            panic!("{page:?}")
        };
        assert_eq!(n1.annotation(Key::PublicIp), Some("10.0.0.1"));
        assert_eq!((n1.annotations.len(), n1.pod_cidrs.len()), (1, 2));
        assert_eq!(
            n1.network_unavailable,
            Some(("True".into(), "NoRouteCreated".into()))
        );
        assert_eq!(
            (&*n2.pod_cidrs, &n2.network_unavailable),
            (&["10.244.2.0/24".into()][..], &None)
        );
        assert!(n3.pod_cidrs.is_empty());
    }

    #[test]
    fn empty_lists_and_broken_ones() {
        for text in [
            r#"{"metadata":{"resourceVersion":"1"},"items":null}"#,
            r#"{"items":[]}"#,
            "{}",
        ] {
            assert!(page(text).unwrap().nodes.is_empty(), "{text}");
        }
        for text in [
            "",
            "[]",
            r#"{"items":[{}]}"#,
            r#"{"items":[{"metadata":{"name":"n1"}}"#,
            r#"{"items":[]} x"#,
        ] {
            assert!(page(text).is_err(), "{text}");
        }
    }
}
