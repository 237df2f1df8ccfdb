# make -f release.mk release/NAME.safetensors
#
# runs/NAME/model.safetensors with its batch norms folded, proven to compute the same, beside the proof and a checksum.
# A recipe that fails leaves no target: convtool writes a file whole or not at all, and make deletes one that verify
# turned down.

HERE := $(dir $(lastword $(MAKEFILE_LIST)))
# The model's code says what a checkpoint doesn't: stride, padding, groups, and the batch norms' eps.
MODEL := $(HERE)../networks.py:ConvBatchNorm

.DELETE_ON_ERROR:

release/%.safetensors: runs/%/model.safetensors
	@mkdir -p release
	convtool fuse $< --recipe conv-bn-torchvision --model $(MODEL) --model-input 1,8,8 -o $@ --force
	convtool verify $< $@ --model $(MODEL) --model-input 1,8,8 --json > release/$*.proof.json
	cd release && sha256sum $*.safetensors > $*.sha256
