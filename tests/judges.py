"""Random checkpoints of the real VLM classes in the hub's layout, everything but their weights.

Two layers deep; with the settings that the hub's processors have, or with small ones."""
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

CLIP = dict(image_mean=[.48145466, .4578275, .40821073], image_std=[.26862954, .26130258, .27577711])
HALF = dict(image_mean=[.5]*3, image_std=[.5]*3)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
MROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1])
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
def square(n):
    return dict(height=n, width=n)

def template(image, user="<|im_start|>user\n", end="<|im_end|>\n", judge="<|im_start|>assistant\n", start="",
             images_first=False):
    "A chat template: `image` where an image stands."
    def part(kind, text):
        return "{% if c.type == '" + kind + "' %}" + text + "{% endif %}"
    def each(*parts):
        return "{% for c in m.content %}" + "".join(parts) + "{% endfor %}"
    words, images = part("text", "{{ c.text }}"), part("image", image)
    content = each(images) + each(words) if images_first else each(images, words)
    turns = "{% for m in messages %}" + user + content + end + "{% endfor %}"
    return start + turns + "{% if add_generation_prompt %}" + judge + "{% endif %}"

def tokenizer(special="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>", bos=None, **named):
    "A tokenizer of bytes, with control tokens of the checkpoint's names."
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(alphabet, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=eos, pad_token=pad, bos_token=bos,
                                   extra_special_tokens=named)
    made.add_tokens([t for t in special.split() if t not in made.get_vocab()], special_tokens=True)
    made.add_tokens(["?<answer>"])   # so that one question can be a token shorter than another
    return made

# Each checkpoint as a function of whether its images are small: the parts of its config, with the names of tokens
# whose ids it holds (`ids`), its tokenizer, and what stands in the processor's files.

QWEN = "<|im_start|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
QWEN_CHAT = template("<|vision_start|><|image_pad|><|vision_end|>")
QWEN_IDS = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
                vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")

def qwen2_5_vl(small):
    size = dict(shortest_edge=28*28, longest_edge=56*56) if small else dict(shortest_edge=3136, longest_edge=12845056)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=14, out_hidden_size=32,
                  window_size=56, fullatt_block_indexes=[1])
    return dict(type="qwen2_5_vl", text=TEXT | dict(rope_parameters=MROPE), vision=vision, ids=QWEN_IDS,
                tokens=tokenizer(QWEN), chat=QWEN_CHAT, context=128000,
                processor="Qwen2_5_VLProcessor",
                images=dict(image_processor_type="Qwen2VLImageProcessor", patch_size=14, size=size, **CLIP))

def qwen3_vl(small, type="qwen3_vl", text={}, vision={}, chat=QWEN_CHAT):
    size = dict(shortest_edge=32*32, longest_edge=64*64) if small else dict(shortest_edge=65536, longest_edge=16777216)
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=16, out_hidden_size=32,
                  num_position_embeddings=64) | vision
    images = dict(patch_size=16, temporal_patch_size=2, merge_size=2, size=size, **HALF)
    return dict(type=type, text=TEXT | dict(rope_parameters=MROPE | dict(mrope_interleaved=True)) | text,
                vision=vision, ids=QWEN_IDS, tokens=tokenizer(QWEN), chat=chat,
                context=262144, processor="Qwen3VLProcessor",
                images=dict(image_processor_type="Qwen2VLImageProcessorFast", **images),
                videos=dict(video_processor_type="Qwen3VLVideoProcessor", **images))

DEEP = dict(deepstack_visual_indexes=[0])
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
              linear_key_head_dim=8, linear_value_head_dim=8,
              head_dim=32, rope_parameters=MROPE | dict(mrope_interleaved=True, partial_rotary_factor=.25))

def internvl3(small):
    edge = 28 if small else 448
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
                 video_token="<video>")
    return dict(type="internvl", text=TEXT | dict(model_type="qwen2"),
                vision=TOWER | dict(image_size=[edge]*2, patch_size=[14, 14]),
                ids=dict(image_token_id="<IMG_CONTEXT>"),
                extra=dict(image_seq_length=(edge//28)**2), tokens=tokenizer(**named),
                chat=template("<IMG_CONTEXT>\n"), context=32768,
                processor="InternVLProcessor", facts=dict(image_seq_length=(edge//28)**2),
                images=dict(image_processor_type="GotOcr2ImageProcessorFast", size=square(edge),
                            crop_to_patches=False, min_patches=1, max_patches=2 if small else 12, **CLIP),
                videos=dict(video_processor_type="InternVLVideoProcessor", size=square(edge)))

def llava_onevision(small):
    edge = 28 if small else 384
    grid = [[edge*i, edge*j] for i in range(1, 7) for j in range(1, 7)]
    return dict(type="llava_onevision", text=TEXT | dict(model_type="qwen2"),
                vision=TOWER | dict(model_type="siglip_vision_model", image_size=edge, patch_size=14,
                                    vision_use_head=False),
                ids=dict(image_token_id="<image>", video_token_id="<video>"), extra=dict(image_grid_pinpoints=grid),
                tokens=tokenizer("<|im_start|> <image> <video>"), chat=template("<image>\n", images_first=True),
                context=32768,
                processor="LlavaOnevisionProcessor",
                facts=dict(num_image_tokens=(edge//14)**2, vision_feature_select_strategy="full"),
                images=dict(image_processor_type="LlavaOnevisionImageProcessor", size=square(edge),
                            image_grid_pinpoints=grid, **HALF),
                videos=dict(video_processor_type="LlavaOnevisionVideoProcessor", size=square(edge)))

def llava_next_video(small):
    edge = 28 if small else 336
    grid = [[edge*i, edge*j] for i, j in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return dict(type="llava_next_video", text=TEXT | dict(model_type="llama"),
                vision=TOWER | dict(model_type="clip_vision_model", image_size=edge, patch_size=14),
                ids=dict(image_token_id="<image>", video_token_id="<video>"),
                extra=dict(image_grid_pinpoints=grid, image_seq_length=(edge//14)**2),
                tokens=tokenizer("<image> <video>", eos="</s>", pad="<pad>", bos="<s>"), context=4096,
                chat=template("<image>\n", user="USER: ", end=" ", judge="ASSISTANT:", images_first=True),
                processor="LlavaNextVideoProcessor",
                facts=dict(patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1),
                images=dict(image_processor_type="LlavaNextImageProcessor", size=dict(shortest_edge=edge),
                            crop_size=square(edge), image_grid_pinpoints=grid, **CLIP),
                videos=dict(video_processor_type="LlavaNextVideoVideoProcessor", size=dict(shortest_edge=edge)))

def idefics3(small, type="idefics3", kind="Idefics3", edge=364, context=10240, **more):
    edge = 28 if small else edge
    tiles = " ".join(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
    tokens = f"<image> <fake_token_around_image> <end_of_utterance> <global-img> {tiles}"
    return dict(type=type, text=TEXT | dict(model_type="llama"),
                vision=TOWER | dict(image_size=edge, patch_size=7 if small else 14),
                ids=dict(image_token_id="<image>"), extra=dict(scale_factor=2),
                tokens=tokenizer(tokens, eos="<end_of_utterance>", pad="<pad>", bos="<|begin_of_text|>"),
                context=context,
                chat=template("<image>", start="<|begin_of_text|>", user="User:", end="<end_of_utterance>\n",
                              judge="Assistant:"),
                processor=f"{kind}Processor",
                facts=dict(image_seq_len=(edge//14)**2 if small else {364: 169, 384: 81}[edge]),
                images=dict(image_processor_type=f"{kind}ImageProcessor",
                            size=dict(longest_edge=edge*(2 if small else 4)), max_image_size=dict(longest_edge=edge),
                            **HALF), **more)

def smolvlm2(small):
    return idefics3(small, "smolvlm", "SmolVLM", 384, 8192,
                    videos=dict(video_processor_type="SmolVLMVideoProcessor", num_frames=64, fps=1))

def gemma3(small):
    edge, n = (28, 4) if small else (896, 256)
    named = dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    text = TEXT | dict(layer_types=["sliding_attention", "full_attention"], sliding_window=16 if small else 1024,
                       query_pre_attn_scalar=8)
    return dict(type="gemma3", text=text,
                vision=TOWER | dict(image_size=edge, patch_size=14 if not small else 7, vision_use_head=False),
                ids=dict(image_token_index="<image_soft_token>", boi_token_index="<start_of_image>",
                         eoi_token_index="<end_of_image>"), extra=dict(mm_tokens_per_image=n),
                tokens=tokenizer("<start_of_turn>", eos="<end_of_turn>", pad="<pad>", bos="<bos>", **named),
                context=131072,
                chat=template("<start_of_image>", start="{{ bos_token }}", user="<start_of_turn>user\n",
                              end="<end_of_turn>\n", judge="<start_of_turn>model\n"),
                processor="Gemma3Processor", facts=dict(image_seq_length=n),
                images=dict(image_processor_type="Gemma3ImageProcessor", size=square(edge), **HALF))

GLM_IDS = dict(image_token_id="<|image|>", video_token_id="<|video|>", image_start_token_id="<|begin_of_image|>",
               image_end_token_id="<|end_of_image|>",
               video_start_token_id="<|begin_of_video|>", video_end_token_id="<|end_of_video|>")

def glm4v(small, type="glm4v", text={}):
    size = dict(shortest_edge=28*28*2, longest_edge=56*56*2) if small else dict(shortest_edge=12544,
                                                                                longest_edge=9633792)
    text = TEXT | dict(head_dim=16, rope_parameters=MROPE | dict(partial_rotary_factor=.5)) | text
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=14, image_size=56,
                  out_hidden_size=32)
    return dict(type=type, text=text, vision=vision, ids=GLM_IDS,
                tokens=tokenizer(" ".join([*GLM_IDS.values(), "<|user|> <|assistant|> [gMASK]<sop>"]),
                                 eos="<|user|>"), context=65536,
                chat=template("<|begin_of_image|><|image|><|end_of_image|>", start="[gMASK]<sop>", user="<|user|>\n",
                              end="", judge="<|assistant|>\n"),
                processor="Glm4vProcessor",
                images=dict(image_processor_type="Glm4vImageProcessor", size=size, patch_size=14, **CLIP),
                videos=dict(video_processor_type="Glm4vVideoProcessor", size=size))

MISTRAL = dict(tokens="<s> [IMG] [IMG_BREAK] [IMG_END] [INST] [/INST]",
               chat=template("[IMG]", start="<s>", user="[INST]", end="[/INST]", judge=""))

def mistral3(small):
    return dict(type="mistral3", text=TEXT | dict(model_type="mistral"),
                vision=TOWER | dict(model_type="pixtral", image_size=1540, patch_size=14, head_dim=8),
                ids=dict(image_token_id="[IMG]"), extra=dict(spatial_merge_size=2),
                tokens=tokenizer(MISTRAL["tokens"], eos="</s>", pad="<pad>", bos="<s>"), chat=MISTRAL["chat"],
                context=131072,
                processor="PixtralProcessor", facts=dict(patch_size=14, spatial_merge_size=2),
                images=dict(image_processor_type="PixtralImageProcessor", patch_size=14,
                            size=dict(longest_edge=56 if small else 1540), **CLIP))

def pixtral(small):
    return dict(type="llava", text=TEXT | dict(model_type="mistral"),
                vision=TOWER | dict(model_type="pixtral", image_size=1024, patch_size=16, head_dim=8),
                ids=dict(image_token_id="[IMG]"),
                extra=dict(vision_feature_layer=-1, vision_feature_select_strategy="full"),
                tokens=tokenizer(MISTRAL["tokens"], eos="</s>", pad="<pad>", bos="<s>"), chat=MISTRAL["chat"],
                context=1024000,
                processor="PixtralProcessor", facts=dict(patch_size=16),
                images=dict(image_processor_type="PixtralImageProcessor", patch_size=square(16),
                            size=dict(longest_edge=64 if small else 1024), **CLIP))

def mllama(small):
    edge = 28 if small else 560
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_global_layers=1, attention_heads=4,
                  vision_output_dim=64, image_size=edge, patch_size=14,
                  intermediate_layers_indices=[0], max_num_tiles=4)
    return dict(type="mllama", text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, cross_attention_layers=[1],
                                         rope_parameters=dict(rope_type="default", rope_theta=1e4)),
                vision=vision, ids=dict(image_token_index="<|image|>"), context=131072,
                tokens=tokenizer("<|image|> <|python_tag|> <|start_header_id|>", eos="<|eot_id|>", pad="<pad>",
                                 bos="<|begin_of_text|>"),
                chat=template("<|image|>", start="{{ bos_token }}", user="<|start_header_id|>user\n\n",
                              end="<|eot_id|>", judge="<|start_header_id|>assistant\n\n"),
                processor="MllamaProcessor",
                images=dict(image_processor_type="MllamaImageProcessor", size=square(edge), max_image_tiles=4, **HALF))

def paligemma2(small):
    edge = 28 if small else 448
    return dict(type="paligemma", text=TEXT | dict(model_type="gemma2"),
                vision=TOWER | dict(model_type="siglip_vision_model", image_size=edge, patch_size=14,
                                    vision_use_head=False),
                ids=dict(image_token_id="<image>"), extra=dict(projection_dim=32),
                tokens=tokenizer("", eos="<eos>", pad="<pad>", bos="<bos>", image_token="<image>"), chat=None,
                context=8192,
                processor="PaliGemmaProcessor",
                images=dict(image_processor_type="SiglipImageProcessor", size=square(edge),
                            image_seq_length=(edge//14)**2, **HALF))

def minicpm_v(small):
    edge = 56 if small else 448
    named = dict(image_token="<image_pad>", video_token="<video_pad>", image_start_token="<image>",
                 image_end_token="</image>", slice_start_token="<slice>", slice_end_token="</slice>",
                 image_id_start_token="<image_id>", image_id_end_token="</image_id>")
    images = dict(patch_size=14, scale_resolution=edge, max_slice_nums=2 if small else 9, **HALF)
    return dict(type="minicpmv4_6", text=TEXT | LINEAR | dict(model_type="qwen3_5_text"),
                vision=TOWER | dict(image_size=edge*2, patch_size=14, insert_layer_id=0),
                ids=dict(image_token_id="<image_pad>", video_token_id="<video_pad>"),
                extra=dict(insert_layer_id=0, image_size=edge),
                tokens=tokenizer(**named), chat=template("<image_pad>\n"), context=262144,
                processor="MiniCPMV4_6Processor",
                images=dict(image_processor_type="MiniCPMV4_6ImageProcessor", **images),
                videos=dict(video_processor_type="MiniCPMV4_6VideoProcessor", **images))

GLM_MOE = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1,
               first_k_dense_replace=1)

JUDGES = {
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": lambda small: qwen3_vl(small, vision=DEEP),
    "Qwen3-VL Thinking": lambda small: qwen3_vl(small, vision=DEEP,
                                                chat=QWEN_CHAT.replace("assistant\n", "assistant\n<think>\n")),
    "Qwen3-VL MoE": lambda small: qwen3_vl(small, "qwen3_vl_moe", MOE, DEEP),
    "Qwen3.5": lambda small: qwen3_vl(small, "qwen3_5", LINEAR),
    "Qwen3.5 MoE": lambda small: qwen3_vl(small, "qwen3_5_moe",
                                          LINEAR | MOE | dict(shared_expert_intermediate_size=32)),
    "InternVL3": internvl3,
    "LLaVA-OneVision": llava_onevision,
    "LLaVA-NeXT-Video": llava_next_video,
    "Idefics3": idefics3,
    "SmolVLM2": smolvlm2,
    "Gemma3": gemma3,
    "GLM-4.1V": glm4v,
    "GLM-4.5V (MoE)": lambda small: glm4v(small, "glm4v_moe", GLM_MOE),
    "Mistral3": mistral3,
    "Pixtral": pixtral,
    "Llama-3.2-Vision": mllama,
    "PaliGemma2": paligemma2,
    "MiniCPM-V 4.6": minicpm_v,
}

def make(
    name,          # of JUDGES
    folder,
    small=True,    # images of a few patches; False: as the hub has them
    weights=True,
):
    "Write a checkpoint."
    folder, made = Path(folder), JUDGES[name](small)
    words = made["tokens"]
    words.save_pretrained(folder)
    if made["chat"]: (folder/"chat_template.jinja").write_text(made["chat"], "utf-8")
    files = dict(preprocessor_config=made["images"], processor_config=made.get("facts", {}),
                 video_preprocessor_config=made.get("videos"))
    for file, data in files.items():
        if data is None: continue
        text = json.dumps(data | dict(processor_class=made["processor"]), indent=1)
        (folder/f"{file}.json").write_text(text, "utf-8")
    special = dict(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, bos_token_id=words.bos_token_id)
    text = made["text"] | special | dict(vocab_size=len(words), max_position_embeddings=made["context"])
    ids = {key: words.convert_tokens_to_ids(token) for key, token in made["ids"].items()}
    config = AutoConfig.for_model(made["type"], text_config=text, vision_config=made["vision"],
                                  tie_word_embeddings=False, **special, **ids, **made.get("extra", {}))
    if not weights: return config.save_pretrained(folder) or folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for p in model.parameters():   # so far apart that the likeliest token is one
            if p.ndim > 1: torch.nn.init.normal_(p, std=.1)
    model.save_pretrained(folder)
    return folder
