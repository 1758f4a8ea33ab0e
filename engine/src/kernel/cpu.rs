//! Which instructions this CPU has, found once, and which of them are used. Nothing computes here.

use std::sync::OnceLock;

/// Forces a path at or below what the CPU has: `amx`, `avx512-vnni`, `avx512`, `avx2` or `portable`.
pub const CPU_PATH_VARIABLE: &str = "MODELBROKER_CPU_PATH";

/// The code path that kernels take. Each has everything that the ones below it have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CpuPath {
    /// Whatever the build targets.
    Portable,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX-512 with BF16 and VNNI.
    Avx512Vnni,
    /// As above, with AMX tiles for bf16 and int8.
    Amx,
}

impl CpuPath {
    /// All paths, slowest first.
    pub(crate) const ALL: [CpuPath; 5] =
        [CpuPath::Portable, CpuPath::Avx2, CpuPath::Avx512, CpuPath::Avx512Vnni, CpuPath::Amx];

    /// Its name in [`CPU_PATH_VARIABLE`].
    const fn short_name(self) -> &'static str {
        match self {
            CpuPath::Portable => "portable",
            CpuPath::Avx2 => "avx2",
            CpuPath::Avx512 => "avx512",
            CpuPath::Avx512Vnni => "avx512-vnni",
            CpuPath::Amx => "amx",
        }
    }

    /// Whether bf16 products have instructions of their own.
    pub(crate) fn has_bf16(self) -> bool {
        self >= CpuPath::Avx512Vnni
    }
}

#[cfg(test)]
thread_local! {
    static FORCED: std::cell::Cell<Option<CpuPath>> = const { std::cell::Cell::new(None) };
}

/// Runs `work` with all kernels of this thread on `path`, which the CPU must have. Threads of the pool do not follow.
#[cfg(test)]
pub(crate) fn with_path<T>(path: CpuPath, work: impl FnOnce() -> T) -> T {
    assert!(path <= detected(), "this CPU has no {path:?}");
    let before = FORCED.replace(Some(path));
    let result = work();
    FORCED.set(before);
    result
}

/// The paths that can be tested on this CPU.
#[cfg(test)]
pub(crate) fn available() -> impl Iterator<Item = CpuPath> {
    CpuPath::ALL.into_iter().filter(|path| *path <= detected())
}

/// The path that kernels take.
pub(crate) fn path() -> CpuPath {
    #[cfg(test)]
    if let Some(path) = FORCED.get() {
        return path;
    }
    static PATH: OnceLock<CpuPath> = OnceLock::new();
    *PATH.get_or_init(|| {
        let best = detected();
        let Some(asked) = std::env::var(CPU_PATH_VARIABLE).ok().filter(|value| !value.is_empty()) else {
            return best;
        };
        match CpuPath::ALL.into_iter().find(|path| path.short_name() == asked) {
            Some(path) if path <= best => path,
            Some(_) => {
                tracing::warn!(
                    asked,
                    best = best.short_name(),
                    "{CPU_PATH_VARIABLE} names what this CPU has not"
                );
                best
            }
            None => {
                let known = CpuPath::ALL.map(CpuPath::short_name).join(", ");
                tracing::warn!(asked, known, "{CPU_PATH_VARIABLE} names no path");
                best
            }
        }
    })
}

/// The best path of this CPU.
fn detected() -> CpuPath {
    static BEST: OnceLock<CpuPath> = OnceLock::new();
    *BEST.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> CpuPath {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return CpuPath::Portable;
    }
    let wide = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if !wide {
        return CpuPath::Avx2;
    }
    if !(is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni")) {
        return CpuPath::Avx512;
    }
    if super::amx::is_usable() { CpuPath::Amx } else { CpuPath::Avx512Vnni }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> CpuPath {
    CpuPath::Portable
}

/// Whether kernels of this process multiply bf16 by instructions of their own, faster than f32.
pub fn has_native_bf16() -> bool {
    path().has_bf16()
}

/// Name of the path, for fingerprints and reports.
pub(crate) fn path_name() -> &'static str {
    match path() {
        CpuPath::Amx => "x86-64-amx",
        CpuPath::Avx512Vnni => "x86-64-avx512-vnni",
        CpuPath::Avx512 => "x86-64-avx512",
        CpuPath::Avx2 => "x86-64-avx2",
        CpuPath::Portable => "portable",
    }
}
