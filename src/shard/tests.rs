//! Parts make the whole, whatever divides.

use super::*;
use crate::comm::{Communicator, ThreadGroup};
use crate::params::{Init, LoraConfig, ParamSet, Role, SpecList, Trainable};
use candle_core::DType;
use std::rc::Rc;

/// Stages of 7, 0, 4 and 1 parameters.
fn layout() -> Layout {
    let stages = [&[3, 4][..], &[], &[4], &[1]].map(|lengths| {
        let mut specs = SpecList::new("", None);
        for (i, &len) in lengths.iter().enumerate() {
            specs.base(&format!("w{i}"), &[len], Init::Ones);
        }
        specs.finish()
    });
    Layout::new(&stages.each_ref().map(Vec::as_slice), Trainable::Full)
}

fn count(n: usize) -> Result<Tensor> {
    Ok(Tensor::arange(0f32, n as f32, &Device::Cpu)?)
}

#[test]
fn parts_cover_the_whole_once_and_come_back() -> Result<()> {
    for parts in [1, 2, 3, 4, 8, 13] {
        let partition = Partition::new(&layout(), parts);
        assert_eq!((partition.total(), partition.stages()), (12, 4));
        let expected: usize = [7usize, 0, 4, 1].iter().map(|n| n.div_ceil(parts)).sum();
        assert_eq!((partition.shard_len(), partition.padded_len()), (expected, parts * expected));
        let mut seen: Vec<usize> = (0..parts).flat_map(|part| partition.owned(part)).flatten().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..12).collect::<Vec<_>>(), "{parts} parts");
        for part in 0..parts {
            let shard = partition.cut(&count(12)?, part)?;
            assert_eq!(shard.dims(), [expected]);
            let owned: Vec<f32> = partition.owned(part).into_iter().flatten().map(|i| i as f32).collect();
            assert_eq!(partition.strip(&shard, part)?, owned);
            let again = partition.fill(&owned, part, &Device::Cpu)?;
            assert_eq!(again.to_vec1::<f32>()?, shard.to_vec1::<f32>()?);
        }
    }
    Ok(())
}

/// Every rank adds other gradients, one of them none; begun early or not, the shards hold the sum.
#[test]
fn gathered_and_reduced_shards_are_those_of_the_whole() -> Result<()> {
    for ranks in [1, 2, 3] {
        for sharding in [Sharding::None, Sharding::Optimizer, Sharding::Full] {
            ThreadGroup::run(ranks, |world| {
                let comm: &dyn Communicator = &*world.device;
                let (layout, rank) = (layout(), world.rank());
                let partition = Partition::new(&layout, sharding.parts(ranks));
                let index = rank % partition.parts();
                let whole = gather(&partition, &partition.cut(&count(12)?, index)?, comm)?;
                assert_eq!(whole.to_vec1::<f32>()?, count(12)?.to_vec1::<f32>()?);

                let gradients = Gradients::zeros(&layout, &partition, &Device::Cpu)?;
                let mut reduction = Reduction::new(gradients, &partition, comm);
                for e in layout.entries.iter().rev().filter(|_| rank != 1) {
                    let values: Vec<f32> = (e.offset..e.offset + e.len).map(|i| (i * (rank + 1)) as f32).collect();
                    reduction.add(e.stage, vec![(e.slot, Tensor::from_vec(values, e.len, &Device::Cpu)?)])?;
                    if rank == 0 && e.slot == 0 {
                        reduction.begin(e.stage)?;
                    }
                }
                let shard = reduction.finish()?;
                let factor = (0..ranks).filter(|&r| r != 1).map(|r| r + 1).sum::<usize>() as f64;
                let expected = partition.cut(&(count(12)? * factor)?, index)?;
                assert_eq!(shard.to_vec1::<f32>()?, expected.to_vec1::<f32>()?);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Whole stages of parts are the set that was cut, frozen tensors as views and trained ones as leaves; what sets have in
/// common is gathered once while both use it.
#[test]
fn parts_give_the_stages_of_the_whole_set() -> Result<()> {
    let lora = LoraConfig { rank: 2, alpha: 2.0, targets: vec!["a".into()] };
    let stages = [3, 0, 4].map(|len| {
        let mut specs = SpecList::new("", Some(&lora));
        if len > 0 {
            specs.base("a.weight", &[5, len], Init::Normal(1.0));
            specs.adapter("a", len, 5);
            specs.buffer("table", &[len], Init::Normal(1.0));
        }
        specs.finish()
    });
    let specs = stages.each_ref().map(Vec::as_slice);
    let (layout, frozen) = (Layout::new(&specs, Trainable::Lora), Layout::frozen(&specs, Trainable::Lora));
    assert_eq!((layout.total, frozen.total), (2 * (3 + 5) + 2 * (4 + 5), 5 * 3 + 3 + 5 * 4 + 4));
    for (ranks, dtype) in [(1, DType::F32), (2, DType::F32), (3, DType::BF16), (4, DType::F32)] {
        ThreadGroup::run(ranks, |world| {
            let set =
                ParamSet::build(&specs, |spec| Ok(spec.initial(1, &Device::Cpu)?.to_dtype(spec.role.dtype(dtype))?))?;
            let slots: Rc<[usize]> = specs.iter().map(|stage| stage.len()).collect();
            let parts = |layout: &Layout, dtype| Parts::cut(&set, layout, dtype, &world.device);
            let frozen = Rc::new(parts(&frozen, dtype)?);
            let whole = PartSet::new(&slots, &frozen, Some(parts(&layout, DType::F32)?));
            let base = PartSet::new(&slots, &frozen, None);
            let values = |t: &Tensor| -> Result<Vec<f32>> {
                Ok(t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
            };
            for (stage, specs) in specs.iter().enumerate() {
                for leaves in [true, false] {
                    let coming = whole.begin(stage)?;
                    let params = if leaves { coming.leaves()? } else { coming.values()? };
                    assert_eq!(params.iter().count(), specs.len());
                    for (slot, tensor) in params.iter() {
                        let expected = set.stage(stage).iter().nth(slot).map(|(_, tensor)| tensor).expect("a tensor");
                        assert_eq!(values(tensor)?, values(expected)?, "{}", specs[slot].name);
                        assert_eq!((tensor.dims(), tensor.dtype()), (expected.dims(), expected.dtype()));
                        assert_eq!(tensor.is_variable(), leaves && specs[slot].role == Role::Adapter);
                    }
                }
            }
            let begin = |sets: &[&PartSet]| -> Result<u64> {
                let before = world.sent();
                let coming = sets.iter().map(|set| set.begin(2)).collect::<Result<Vec<_>>>()?;
                let sent = world.sent() - before;
                coming.into_iter().try_for_each(|coming| coming.values().map(drop))?;
                Ok(sent)
            };
            let part = |len: usize, dtype: DType| ((ranks - 1) * len.div_ceil(ranks) * dtype.size_in_bytes()) as u64;
            assert_eq!(begin(&[&base])?, part(24, dtype));
            assert_eq!(begin(&[&whole, &base, &whole])?, part(24, dtype) + part(18, DType::F32));
            assert_eq!(begin(&[&base])?, part(24, dtype), "what nobody uses any more is gathered again");
            Ok(())
        })?;
    }
    Ok(())
}
