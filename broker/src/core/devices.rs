//! Where models compute: what was wished for, what there is, and saying so where the two differ. Engines compute on the
//! CPU; whoever wishes for another device gets it there all the same, and the report and the log tell why.

use super::Core;
use super::entry::FailureNote;
use crate::config::DeviceChoice;
use shm_layout::code::Code;
use std::collections::BTreeSet;
use tracing::warn;

/// The name of the one device that engines have.
pub(super) const CPU: &str = "cpu";

/// Of which generations it was told that they compute elsewhere than wished.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    told: BTreeSet<u64>,
}

/// Why a device cannot be had; `None` = the choice is met by the CPU.
pub(super) fn missing(choice: DeviceChoice) -> Option<String> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(_) => Some(format!(
            "the device {choice} cannot be set up: this build has no engine for it; the model is computed on the \
             {CPU}. Set its device to auto or cpu to be told no more"
        )),
    }
}

impl Core {
    /// An engine serves a generation: if it was to be on another device, its model's report and the log say so, once.
    pub(super) fn note_device(&mut self, now_ns: u64, generation: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        let Some(entry) = self.models.entries.get_mut(&image.entry) else { return };
        let Some(message) = missing(entry.settings.device) else { return };
        let images = &self.models.images;
        self.devices.told.retain(|told| images.contains_key(told));
        if !self.devices.told.insert(generation) {
            return;
        }
        let code = Code::DeviceSetupError;
        warn!(event = "model.device.fallback", model = entry.name(), generation, %code, "{message}");
        entry.last_error = Some(FailureNote { code, message, at_ns: now_ns });
        self.metrics.failed(code);
    }
}
