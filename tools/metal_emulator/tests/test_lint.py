"""The lint refuses what Metal refuses, at its line, and takes what Metal takes."""

import re
from typing import Any

import mlx.core as mx
import pytest
from metal_emulator import LintError, lint
from metal_emulator.reserved import RESERVED

WRITE = "\nout[thread_position_in_grid.x] = T(x);"


def check(source: str, header: str = "", dtype: mx.Dtype = mx.float32, **how: Any) -> None:
    lint(
        "snippet",
        source + WRITE,
        {"a": dtype, "n": mx.int32},
        {"out": dtype},
        [("T", dtype), ("N", 4)],
        header=header,
        scalars=["n"],
        **how,
    )


BAD = {
    "no space of a pointer": "float* p; float x = 0; ",
    "no space of a cast": "float y = 0; float x = *(thread float*)(const float*)&y;",
    "device to thread": "thread const T* p = a; float x = p[0];",
    "device to threadgroup": "threadgroup float* p = (device float*)out; float x = p[0];",
    "thread to device": "float y; device float* p = &y; float x = 0;",
    "const dropped": "device T* p = a; float x = p[0];",
    "write to a constant": "n = 3; float x = 0;",
    "double": "double x = 1;",
    "std": "float x = std::exp(1.0f);",
    "lambda": "auto f = [](float y) { return y; }; float x = f(1);",
    "goto": "float x = 0; goto end; end: x = 1;",
    "throw": "float x = 0; if (n) throw 1;",
    "new": "float x = *new float;",
    "min of float and int": "float x = min(1.0f, 1);",
    "max of uint and int": "uint x = max(1u, 1);",
    "components of a vector": "float x = float2(1, 2).z;",
    "unknown name": "float x = simd_summ(1.0f);",
    "unknown attribute": "float x = thread_position_in_cluster.x;",
    "bfloat from float": "bfloat x = 1.0f * n;",
    "half times bfloat": "float x = float(half(1) * bfloat(2));",
    "half or bfloat": "float x = n ? half(1) : bfloat(2);",
    "matrix of 16": "simdgroup_matrix<float, 16, 16> m; float x = 0;",
    "matrix from other elements": "simdgroup_matrix<half, 8, 8> m; "
    "simdgroup_load(m, (const device float*)out); float x = 0;",
    "two types of a shuffle": "float x = simd_shuffle(1.0f);",
    "barrier without flags": "threadgroup_barrier(); float x = 0;",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_refused_at_its_line(name: str) -> None:
    with pytest.raises(LintError, match="^snippet: line 2:.*error"):
        check("// the second line is bad\n" + BAD[name])


BAD_HEADERS = {
    "no space of a parameter": "float g(float* p) { return *p; }",
    "no space of a reference": "float g(const float& p) { return p; }",
    "no space of a result": "struct S { float v; float& at() { return v; } };",
    "generic this": "struct S { float v; thread float& at() { return v; } };",
    "no space of a pointer's reference": "float g(float*& p) { return *p; }",
    "write to constant memory": "void g(constant int& x) { x = 1; }",
    "variable at file scope": "int counter = 0;",
    "space of an input": "float f(const device float* p) { return *p; }",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header_is_refused_at_its_line(name: str) -> None:
    used = " f(" in BAD_HEADERS[name]
    body = "float x = f(a);" if used else "float x = 0;"
    where = "line 1" if used else "header line 2"
    with pytest.raises(LintError, match=f"^snippet: {where}:.*error"):
        check(body, f"// a comment\n{BAD_HEADERS[name]}\n")


POSITIONS = {  # what is declared, in the body or in the header
    "variable": ("float {} = 0; float x = {};", ""),
    "member": ("struct S {{ float {}; }}; S s; s.{} = 0; float x = s.{};", ""),
    "type": ("struct {} {{ float v; }}; float x = 0;", ""),
    "enumerator": ("enum {{ {} = 3 }}; float x = 0;", ""),
    "parameter": ("float x = 0;", "inline float g(float {}) {{ return 1; }}"),
    "function": ("float x = 0;", "inline float {}(float a) {{ return a; }}"),
    "parameter of a template": ("float x = 0;", "template <typename {}> float g(float a);"),
    "value of a template": ("float x = 0;", "template <int {}> float g(float a);"),
    "alias": ("float x = 0;", "using {} = float;"),
    "label": ("float x; {}: x = 0;", ""),
    "macro": ("float x = 0;", "#define {} 1\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("word", [*RESERVED, "bfloat", "half", "threadgroup", "register"])
def test_reserved_words_are_refused_in_every_position(word: str, position: str) -> None:
    body, header = (text.format(*[word] * 3) for text in POSITIONS[position])
    with pytest.raises(LintError, match="^snippet: (header )?line 1:.*error"):
        check(body, header)


def test_reserved_words_in_branches_for_other_compilers_are_nobodys() -> None:
    branch = "#if{} __METAL__\n#define MANY \\\n  kernel\nint vertex;\n#else\nint quad;\n#endif\n"
    for condition, expected in (
        ("def", [("3", "kernel"), ("4", "vertex")]),
        ("ndef", [("6", "quad")]),
    ):
        with pytest.raises(LintError) as raised:
            check("float x = 0;", branch.format(condition))
        assert re.findall(r"line (\d): .*'(\w+)'", str(raised.value)) == expected
    check("float x = 0;", "#ifdef __CUDACC__\nint register kernel;\n#endif\n")


def test_reserved_words_within_others_and_in_comments_are_nobodys() -> None:
    check("float fragments = 0, my_quad = 1; float x = fragments + my_quad; // a fragment")


GOOD = {
    "pointer of any space": "auto p = a; auto q = p + 1; float x = float(*q) + n;",
    "spaces named": "threadgroup T s[N]; threadgroup T* p = s; device T* q = out; float y = 1; "
    "thread float& z = y; p[0] = T(0); float x = z + float(q[0]);",
    "vectors": "float4 y = float4(1); y.xy = float2(2, 3); float x = dot(y, y);",
    "matrices": "simdgroup_matrix<float, 8, 8> m(0.0f); simdgroup_multiply_accumulate(m, m, m, m); "
    "float x = m.thread_elements()[0];",
    "narrow types converted": "bfloat y = bfloat(1.5f); half z = half(float(y)); float x = z + n;",
    "half from float": "half y = 1.0f; float x = y;",
    "constants": "constexpr int C = 2 * N; float y[C]; y[0] = 0.1; float x = y[0];",
    "lambdas of Metal 4": "#if __METAL_VERSION__ >= 400\nauto same = [](float y) { return y; };\n"
    "float x = same(1);\n#else\nfloat x = 0;\n#endif",
    "versions": "#if __METAL_VERSION__ >= 400\nfloat x = 1;\n#else\nfloat x = 0;\n#endif",
}
HEADER = """
constant constexpr int Four = 4;
template <typename P> float first(P p) { return float(p[0]); }
struct Named { typedef float type; };
struct Pair {
  float v[2];
  float sum() const thread { return v[0] + v[1]; }
  float product() { return v[0] * v[1]; }
  thread float& at(int i) thread { return v[i]; }
};
// What Metal takes and clang, as it is, does not.
constant bool masked [[function_constant(3)]];
struct Wide {
  float v;
  Wide(float x) thread : v(x) {}
  operator vec<float, 2>() const thread { return vec<float, 2>(v, v); }
};
METAL_FUNC Wide widened(float x) { return {masked ? x : 0.0f}; }
METAL_FUNC float next(const device float*& p) { return *p++; }
METAL_FUNC int once(constant int& x, const thread short& y) { return x + y; }
METAL_FUNC int passed(const constant int& x) { return once(x, 1); }
template <typename T> METAL_FUNC T cast(half x) { return static_cast<T>(x); }
METAL_FUNC bfloat narrow(half x) { return cast<bfloat>(x); }
constant metal::os_log logger("a", "b");
METAL_FUNC void told(int x) { logger.log_debug("%d", x); }
kernel void other(device float* out) {
  threadgroup typename Named::type s[2];
  out[0] = widened(s[0]).v;
}
inline float twice(thread const Pair& p) { Pair q = p; return q.at(0) + first(q.v) + Four; }
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_good_text_is_taken(name: str, dtype: mx.Dtype) -> None:
    check("Pair pair; float f = twice(pair) + first(a);\n" + GOOD[name], HEADER, dtype)


@pytest.mark.slow
def test_each_version_of_metal_is_read() -> None:
    for condition in ("< 400", ">= 400"):
        with pytest.raises(LintError, match="wrong"):
            check(f"#if __METAL_VERSION__ {condition}\nwrong\n#endif\nfloat x = 0;")


def test_space_of_an_input_may_be_named_where_it_is_always_large() -> None:
    check("const device T* p = a; float x = float(p[0]);", large=["a"])
    with pytest.raises(LintError, match="line 1:.*constant"):
        check("const device T* p = a; float x = float(p[0]);")


def test_more_buffers_than_metal_has_are_refused() -> None:
    names = tuple(f"input{i}" for i in range(31))
    source, inputs = "out[0] = thread_index_in_simdgroup;", dict.fromkeys(names, mx.float32)
    with pytest.raises(LintError, match="32 buffers, Metal allows 31"):
        lint("snippet", source, inputs, {"out": mx.float32}, large=names)
