//! Which vector instructions this CPU has, found once. Nothing else.

use std::sync::OnceLock;

/// The code path that kernels take on this CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CpuPath {
    /// AVX-512 (F, BW, DQ, VL) with FMA.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Whatever the build targets.
    Portable,
}

/// The path of this CPU.
pub(super) fn path() -> CpuPath {
    static PATH: OnceLock<CpuPath> = OnceLock::new();
    *PATH.get_or_init(detect)
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
    if wide { CpuPath::Avx512 } else { CpuPath::Avx2 }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> CpuPath {
    CpuPath::Portable
}

/// Name of the path, for fingerprints and reports.
pub(crate) fn path_name() -> &'static str {
    match path() {
        CpuPath::Avx512 => "x86-64-avx512",
        CpuPath::Avx2 => "x86-64-avx2",
        CpuPath::Portable => "portable",
    }
}
