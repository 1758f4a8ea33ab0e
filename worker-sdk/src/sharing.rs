//! Whether this program uses the shared models, and what it does when it cannot: the switches for a roll-out and the way
//! back. Deciding is here; loading a model privately is `fallback`'s.

use crate::error::SdkError;

/// Environment variables that switch sharing off or on, the first that is set counts.
pub const SHARING_VARIABLES: [&str; 2] =
    ["MODELBROKER_SHARING_ENABLED", "CORE_MODEL_MANAGER_SHARING_ENABLED"];
/// Environment variables that name the share of programs that use sharing, in percent; the first that is set counts.
pub const ROLLOUT_VARIABLES: [&str; 2] =
    ["MODELBROKER_SHARING_ROLLOUT_PERCENT", "CORE_MODEL_MANAGER_SHARING_ROLLOUT_PERCENT"];
/// Environment variable that says what to do when the shared model cannot be had: `error` or `local`.
pub const FALLBACK_VARIABLE: &str = "MODELBROKER_FALLBACK";

/// What happens when the shared model cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Fallback {
    /// The call fails and says why.
    #[default]
    Error,
    /// The model is loaded in this process, privately, and the call goes on there; later calls try to return to the shared
    /// one. Needs the feature `local`.
    Local,
}

/// Where a model's answers are computed just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// On the shared model, by an engine (or answered from the shared cache).
    Shared,
    /// On a model that this process loaded for itself.
    Private,
}

/// Which programs share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// The one switch: off, every program loads its models itself.
    pub(crate) enabled: bool,
    /// Share of programs that use sharing, 0 to 100.
    pub(crate) rollout_percent: u8,
}

impl Default for Sharing {
    fn default() -> Sharing {
        Sharing { enabled: true, rollout_percent: 100 }
    }
}

impl Sharing {
    /// Whether a program of this name shares; always the same for the same name.
    pub(crate) fn includes(self, name: &str) -> bool {
        self.enabled && rollout_bucket(name) < self.rollout_percent
    }

    /// As the environment says.
    pub(crate) fn from_environment() -> Result<Sharing, SdkError> {
        let mut sharing = Sharing::default();
        if let Some((variable, value)) = first(&SHARING_VARIABLES) {
            sharing.enabled = switch(variable, &value)?;
        }
        if let Some((variable, value)) = first(&ROLLOUT_VARIABLES) {
            sharing.rollout_percent = percent(variable, &value)?;
        }
        Ok(sharing)
    }
}

impl Fallback {
    /// As the environment says.
    pub(crate) fn from_environment() -> Result<Fallback, SdkError> {
        match first(&[FALLBACK_VARIABLE]) {
            Some((variable, value)) => fallback(variable, &value),
            None => Ok(Fallback::default()),
        }
    }
}

/// The place of a program among 100, by its name (FNV-1a, 64 bits, modulo 100): it shares when the roll-out's percentage is
/// above this. The name is what [`crate::ClientBuilder::name`] says, else the program's file name.
#[must_use]
pub fn rollout_bucket(name: &str) -> u8 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash % 100) as u8
}

fn first(variables: &[&'static str]) -> Option<(&'static str, String)> {
    variables.iter().find_map(|variable| {
        let value = std::env::var_os(variable)?.to_string_lossy().trim().to_owned();
        (!value.is_empty()).then_some((*variable, value))
    })
}

fn switch(variable: &str, value: &str) -> Result<bool, SdkError> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "0" | "false" | "no" | "off" => Ok(false),
        _ => Err(SdkError::Argument(format!("{variable} is {value:?}: give true or false"))),
    }
}

fn percent(variable: &str, value: &str) -> Result<u8, SdkError> {
    match value.parse() {
        Ok(percent @ 0..=100) => Ok(percent),
        _ => Err(SdkError::Argument(format!("{variable} is {value:?}: give a whole number from 0 to 100"))),
    }
}

fn fallback(variable: &str, value: &str) -> Result<Fallback, SdkError> {
    match value.to_ascii_lowercase().as_str() {
        "error" => Ok(Fallback::Error),
        "local" => Ok(Fallback::Local),
        _ => Err(SdkError::Argument(format!("{variable} is {value:?}: give error or local"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_stays_in_when_the_share_grows() {
        let names: Vec<String> = (0..1000).map(|number| format!("worker-{number}")).collect();
        let mut before = 0;
        for rollout_percent in [0, 5, 50, 100] {
            let sharing = Sharing { enabled: true, rollout_percent };
            let count = names.iter().filter(|name| sharing.includes(name)).count();
            let expected = usize::from(rollout_percent) * 10;
            assert!(count.abs_diff(expected) <= 60, "{count} of 1000 at {rollout_percent} %");
            assert!(
                count >= before
                    && (rollout_percent != 0 || count == 0)
                    && (rollout_percent != 100 || count == 1000)
            );
            before = count;
        }
        let smaller = Sharing { enabled: true, rollout_percent: 30 };
        let larger = Sharing { enabled: true, rollout_percent: 31 };
        assert!(names.iter().all(|name| !smaller.includes(name) || larger.includes(name)));
        assert!(!Sharing { enabled: false, rollout_percent: 100 }.includes("any"));
    }

    #[test]
    fn the_place_of_a_name_is_as_documented() {
        // FNV-1a of the empty text is its offset basis.
        assert_eq!(u64::from(rollout_bucket("")), 0xcbf2_9ce4_8422_2325 % 100);
        assert_eq!(u64::from(rollout_bucket("a")), 0xaf63_dc4c_8601_ec8c % 100);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        assert!(switch("V", "TRUE").unwrap() && !switch("V", "off").unwrap());
        assert_eq!((percent("V", "0").unwrap(), percent("V", "100").unwrap()), (0, 100));
        for error in [
            switch("V", "maybe").unwrap_err(),
            percent("V", "101").unwrap_err(),
            percent("V", "-1").unwrap_err(),
        ] {
            assert!(error.to_string().starts_with("V is "), "{error}");
        }
        assert_eq!(fallback("V", "Local").unwrap(), Fallback::Local);
        assert!(fallback("V", "remote").is_err());
    }
}
