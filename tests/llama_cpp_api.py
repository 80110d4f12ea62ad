"""llama.cpp itself, through its C API: the wheels of llama-cpp-py-sync contain its libraries."""

import torch
from llama_cpp_py_sync import _cffi_bindings as bindings

GGML_TYPE_F32, NO_FLASH_ATTENTION = 0, 0


class Model:
    """A GGUF file of a model, with adapters; keys and values are kept in fp32."""

    def __init__(self, path, adapters=()):
        self.ffi, self.lib = bindings.get_ffi(), bindings.get_lib()
        self._silent = self.ffi.callback("ggml_log_callback", lambda level, text, data: None)
        self.lib.llama_log_set(self._silent, self.ffi.NULL)
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model != self.ffi.NULL, "llama.cpp does not load the model"
        options = self.lib.llama_context_default_params()
        options.n_ctx = options.n_batch = 64
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = GGML_TYPE_F32
        options.flash_attn_type = NO_FLASH_ATTENTION
        self.context = self.lib.llama_init_from_model(self.model, options)
        self._adapters = [self.lib.llama_adapter_lora_init(self.model, str(path).encode()) for path in adapters]
        assert self.ffi.NULL not in self._adapters, "llama.cpp does not load the adapter"
        self.lib.llama_set_adapters_lora(self.context, self._adapters, len(adapters), [1.0] * len(adapters))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)

    def logits(self, tokens):
        """fp32 [tokens, vocabulary]."""
        rows, vocabulary = [], self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        for token in tokens:
            batch = self.lib.llama_batch_get_one(self.ffi.new("llama_token[1]", [token]), 1)
            assert self.lib.llama_decode(self.context, batch) == 0
            rows.append(self.ffi.unpack(self.lib.llama_get_logits_ith(self.context, -1), vocabulary))
        return torch.tensor(rows)

    def tokenize(self, text, special=False):
        """Token ids; `special`: with those that are added to a text, and those that stand in it."""
        data, vocabulary = text.encode(), self.lib.llama_model_get_vocab(self.model)
        room = self.ffi.new("llama_token[1000]")
        count = self.lib.llama_tokenize(vocabulary, data, len(data), room, 1000, special, special)
        return self.ffi.unpack(room, count)
