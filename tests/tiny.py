"Tiny pipelines of the real classes with random weights: everything but quality."
import torch
from diffusers import (
    AutoencoderKLCogVideoX, AutoencoderKLWan, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline,
    CogVideoXTransformer3DModel, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline,
    WanTransformer3DModel)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = "<pad> </s> <unk> a red blue green circle square triangle moves left right up down".split()
T5 = dict(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=.1)
SETTINGS = dict(num_frames=9, height=32, width=32, fps=8., num_inference_steps=3, guidance_scale=3.,
                max_sequence_length=16)

def tokenizer():
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

def wan_vae(**config):
    return AutoencoderKLWan(**dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], scale_factor_spatial=4, latents_mean=[.1, -.2, .3, .4],
        latents_std=[1., 1.5, 2., 2.5]) | config)

def wan(scheduler="unipc", **transformer):
    torch.manual_seed(0)
    config = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32,
                  freq_dim=32, ffn_dim=64, num_layers=2)
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.)
    return WanPipeline(
        tokenizer(), UMT5EncoderModel(UMT5Config(**T5)), wan_vae(),
        FlowMatchEulerDiscreteScheduler(shift=3.) if scheduler == "euler" else unipc,
        WanTransformer3DModel(**config | transformer))

def wan_5b():
    "Wan 2.2 TI2V-5B: a residual VAE that patches its frames, and a timestep for every token."
    torch.manual_seed(0)
    vae = wan_vae(decoder_base_dim=12, z_dim=6, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=8, latents_mean=[.1, -.2, .3, .4, 0., .2], latents_std=[1., 1.5, 2., 2.5, 1., .5])
    return WanPipeline(**wan(in_channels=6, out_channels=6).components | dict(vae=vae), expand_timesteps=True)

def wan_a14b():
    "Wan 2.2 A14B: an expert for t ≥ 875 and one for the rest."
    pipe = wan()
    torch.manual_seed(1)
    second = WanTransformer3DModel.from_config(pipe.transformer.config)
    return WanPipeline(**pipe.components | dict(transformer_2=second), boundary_ratio=.875)

def cogvideox_vae():
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16), down_block_types=("CogVideoXDownBlock3D",)*3,
        up_block_types=("CogVideoXUpBlock3D",)*3, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        scaling_factor=.7)

def cogvideox(scheduler="ddim", **transformer):
    torch.manual_seed(0)
    config = dict(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=32,
        text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=16,
        spatial_interpolation_scale=1.)
    kind = CogVideoXDPMScheduler if scheduler == "dpm" else CogVideoXDDIMScheduler
    return CogVideoXPipeline(
        tokenizer(), T5EncoderModel(T5Config(**T5)), cogvideox_vae(),
        CogVideoXTransformer3DModel(**config | transformer),
        kind(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
             snr_shift_scale=1., set_alpha_to_one=True))

PIPELINES = {   # every kind of checkpoint the two adapters meet
    "wan unipc": wan,
    "wan euler": lambda: wan("euler"),
    "wan 2.2 5b": wan_5b,
    "wan 2.2 a14b": wan_a14b,
    "cogvideox 2b": cogvideox,
    "cogvideox 5b": lambda: cogvideox("dpm", use_rotary_positional_embeddings=True),
    "cogvideox 1.5": lambda: cogvideox("dpm", use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
}

def saved(folder):
    "Each of them, in its folder there."
    for name, make in PIPELINES.items(): make().save_pretrained(folder/name)
    return {name: folder/name for name in PIPELINES}

FORMS = {   # how the libraries write a pipeline beside the plain form
    "bin": dict(safe_serialization=False),
    "fp16": dict(variant="fp16"),
    "sharded": dict(max_shard_size="100KB"),
}
