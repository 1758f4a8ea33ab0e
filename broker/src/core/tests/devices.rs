//! Models that are to compute on a device that there is not.

use super::*;
use crate::config::{DeviceChoice, ModelKind, ModelSettings};

#[test]
fn a_device_that_is_not_there_is_told_once_and_the_cpu_serves() {
    for (device, told) in
        [(DeviceChoice::Auto, false), (DeviceChoice::Cpu, false), (DeviceChoice::Cuda(Some(1)), true)]
    {
        let mut world = World::new(Limits::default());
        let settings = ModelSettings { device, ..ModelSettings::new("m", "m", ModelKind::Embedding) };
        world.core.configure_models(0, &[settings], &[]);
        let (session, lease) = world.leased(false);
        let detail = |world: &mut World| world.status().models.remove(0).detail;
        let first = detail(&mut world);
        assert_eq!((first.device.as_str(), first.device_wished), ("cpu", device.to_string()));
        let code = first.last_error.as_ref().map(|error| error.code);
        assert_eq!(code, told.then_some(Code::DeviceSetupError));
        if let Some(error) = &first.last_error {
            assert!(error.message.contains("cuda:1") && error.message.contains("computed on the cpu"));
        }
        // It serves, also after its engine was replaced, and says no more about it.
        world.now_ns += 5 * MS;
        world.engine_dies();
        let request = world.asks(session, job(lease, 1, 0));
        world.engine_works();
        assert_eq!(world.answer(session, request).status, Code::Ok);
        assert!(detail(&mut world).last_error.is_none_or(|error| error.age_us >= 5000));
    }
}
