//! Which precision a model is loaded in: the end of its reference, else a setting. Only names are handled here.

use engine::compile::Precision;
use std::path::Path;

/// A precision, or the choice of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecisionChoice {
    /// Single precision: what sentence-transformers gives.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
    /// 8-bit integers.
    Int8,
    /// bf16 where this CPU has instructions for it, f32 elsewhere.
    Auto,
}

impl PrecisionChoice {
    const ALL: [(PrecisionChoice, &str); 4] = [
        (PrecisionChoice::F32, "f32"),
        (PrecisionChoice::Bf16, "bf16"),
        (PrecisionChoice::Int8, "int8"),
        (PrecisionChoice::Auto, "auto"),
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(choice, _)| *choice == self).map_or("f32", |(_, name)| name)
    }

    /// The choice of this name: `f32`, `bf16`, `int8`, `auto`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<PrecisionChoice> {
        Self::ALL.into_iter().find(|(_, known)| *known == name).map(|(choice, _)| choice)
    }

    /// The precision on this CPU.
    pub(crate) fn resolve(self) -> Precision {
        match self {
            PrecisionChoice::F32 => Precision::F32,
            PrecisionChoice::Bf16 => Precision::Bf16,
            PrecisionChoice::Int8 => Precision::Int8,
            PrecisionChoice::Auto if engine::has_native_bf16() => Precision::Bf16,
            PrecisionChoice::Auto => Precision::F32,
        }
    }
}

/// A reference without the precision at its end, `model:int8`, and that precision. A folder whose own name ends so is taken
/// as it is.
#[must_use]
pub fn split_precision(reference: &str) -> (&str, Option<PrecisionChoice>) {
    match reference.rsplit_once(':') {
        Some((model, name)) if !Path::new(reference).is_dir() => match PrecisionChoice::from_name(name) {
            Some(choice) => (model, Some(choice)),
            None => (reference, None),
        },
        _ => (reference, None),
    }
}

/// The id of a model in a precision: f32 is the model itself, others follow a colon. Where f32 is not the `default`, the bare
/// name means another precision, so f32 follows a colon too.
pub(crate) fn id_with(model_id: &str, precision: Precision, default: Precision) -> String {
    match (precision, default) {
        (Precision::F32, Precision::F32) => model_id.to_owned(),
        _ => format!("{model_id}:{}", precision.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_end_in_a_precision_or_not() {
        assert_eq!(split_precision("a/b"), ("a/b", None));
        assert_eq!(split_precision("a/b:int8"), ("a/b", Some(PrecisionChoice::Int8)));
        assert_eq!(split_precision("a/b@v1:auto"), ("a/b@v1", Some(PrecisionChoice::Auto)));
        assert_eq!(split_precision("a/b:latest"), ("a/b:latest", None));
        let folder = tempfile::tempdir().unwrap();
        let strange = folder.path().join("model:bf16");
        std::fs::create_dir(&strange).unwrap();
        let strange = strange.to_str().unwrap();
        assert_eq!(split_precision(strange), (strange, None));
        let both = format!("{strange}:f32");
        assert_eq!(split_precision(&both), (strange, Some(PrecisionChoice::F32)));
    }

    #[test]
    fn ids_name_what_is_not_f32() {
        assert_eq!(id_with("a/b", Precision::F32, Precision::F32), "a/b");
        assert_eq!(id_with("a/b", Precision::Int8, Precision::F32), "a/b:int8");
        assert_eq!(id_with("a/b", Precision::F32, Precision::Int8), "a/b:f32");
        assert_eq!(id_with("a/b", Precision::Int8, Precision::Int8), "a/b:int8");
    }
}
