"""Triton kernels of routed execution: grouped products over rows sorted by module, gather and scatter inside.

Rows of module i are those from ends[i - 1] up to before ends[i]. No kernel needs to know a size on the host: the grid
is large enough for any, and programs without work leave at once. Sums are in float32 and in a fixed order (no atomics).
"""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def activate(x, NAME: tl.constexpr):
        """The activation function of float32 values; an empty name is the identity."""
        if NAME == "gelu_tanh":
            x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        elif NAME == "gelu":
            x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
        elif NAME == "relu":
            x = tl.maximum(x, 0.0)
        elif NAME == "silu":
            x = x * tl.sigmoid(x)
        return x

    @triton.jit
    def slope(x, NAME: tl.constexpr):
        """The derivative of `activate`."""
        if NAME == "gelu_tanh":
            s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
            x = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
        elif NAME == "gelu":
            x = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        elif NAME == "relu":
            x = tl.where(x > 0, 1.0, 0.0)
        elif NAME == "silu":
            s = tl.sigmoid(x)
            x = s * (1 + x * (1 - s))
        return x

    @triton.jit
    def index(table, rows, here, INDEXED: tl.constexpr):
        """table[rows], or the rows themselves."""
        if INDEXED:
            rows = tl.load(table + rows, mask=here, other=0)
        return rows.to(tl.int64)

    @triton.jit
    def rows_kernel(
        x, weight, bias, y, before, sources, places, gates, ends,
        inner, outputs, x_stride, w_module, w_inner, w_output, b_module, y_stride, before_stride,
        MODULES: tl.constexpr, SPAN: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr,
        GATES: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, SLOPE: tl.constexpr,
        PRECISION: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """y[places[r]] = gates[r] * f(x[sources[r]] @ weight[module of r] + bias[module of r]) for each row r.

        With SAVE what goes into f is stored in `before`; with SLOPE the result is multiplied by f'(before) instead.
        """
        tiles = tl.num_programs(0) // TILES
        tile, column = tl.program_id(0) % tiles, tl.program_id(0) // tiles
        modules = tl.arange(0, SPAN)
        known = modules < MODULES
        stops = tl.load(ends + modules, mask=known, other=0)
        starts = tl.load(ends + modules - 1, mask=known & (modules > 0), other=0)
        counts = tl.where(known, (stops - starts + ROWS - 1) // ROWS, 0)
        tile_stops = tl.cumsum(counts, 0)
        if tile < tl.sum(counts, 0):
            module = tl.sum((tile_stops <= tile).to(tl.int32), 0)
            mine = modules == module
            first = tl.sum(tl.where(mine, starts + (tile - tile_stops + counts) * ROWS, 0), 0)
            rows = first + tl.arange(0, ROWS)
            here = rows < tl.sum(tl.where(mine, stops, 0), 0)
            out = column * OUTPUTS + tl.arange(0, OUTPUTS)
            there = out < outputs
            source = index(sources, rows, here, GATHER)
            k = tl.arange(0, INNER)
            left = x + source[:, None] * x_stride + k[None, :]
            right = weight + module.to(tl.int64) * w_module + k[:, None] * w_inner + out[None, :] * w_output
            total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
            for start in range(0, inner, INNER):
                inside = start + k < inner
                a = tl.load(left, mask=here[:, None] & inside[None, :], other=0.0)
                b = tl.load(right, mask=inside[:, None] & there[None, :], other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
                left += INNER
                right += INNER * w_inner
            if BIAS:
                added = tl.load(bias + module.to(tl.int64) * b_module + out, mask=there, other=0.0)
                total += added.to(tl.float32)[None, :]
            cells = here[:, None] & there[None, :]
            beside = before + rows.to(tl.int64)[:, None] * before_stride + out[None, :]
            if SAVE:
                tl.store(beside, total.to(before.dtype.element_ty), mask=cells)
            if SLOPE:
                total *= slope(tl.load(beside, mask=cells, other=0.0).to(tl.float32), ACTIVATION)
            else:
                total = activate(total, ACTIVATION)
            if GATES:
                total *= tl.load(gates + rows, mask=here, other=0.0).to(tl.float32)[:, None]
            place = index(places, rows, here, SCATTER)
            tl.store(y + place[:, None] * y_stride + out[None, :], total.to(y.dtype.element_ty), mask=cells)

    @triton.jit
    def weights_kernel(
        x, grad, weight, bias, sources, places, gates, ends,
        inner, outputs, x_stride, grad_stride,
        GATHER: tl.constexpr, SCATTER: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
        ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
    ):  # fmt: skip
        """Gradients: weight[i] = sum of x[sources[r]]^T (gates[r] grad[places[r]]) over the rows r of module i.

        bias[i]: the same without x. Modules without rows get zeros. Grid: tiles of inner x outputs, modules.
        """
        module = tl.program_id(1).to(tl.int64)
        columns = tl.cdiv(outputs, OUTPUTS)
        block = tl.program_id(0) // columns
        k = block * INNER + tl.arange(0, INNER)
        out = (tl.program_id(0) % columns) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside, there = k < inner, out < outputs
        begin = tl.load(ends + module - 1, mask=module > 0, other=0)
        end = tl.load(ends + module)
        total = tl.zeros((INNER, OUTPUTS), dtype=tl.float32)
        sums = tl.zeros((OUTPUTS,), dtype=tl.float32)
        for start in range(begin, end, ROWS):
            rows = start + tl.arange(0, ROWS)
            here = rows < end
            source = index(sources, rows, here, GATHER)
            place = index(places, rows, here, SCATTER)
            a = tl.load(x + source[None, :] * x_stride + k[:, None], mask=inside[:, None] & here[None, :], other=0.0)
            g = tl.load(
                grad + place[:, None] * grad_stride + out[None, :], mask=here[:, None] & there[None, :], other=0.0
            )
            if GATES:
                g = (g * tl.load(gates + rows, mask=here, other=0.0).to(tl.float32)[:, None]).to(a.dtype)
            total = tl.dot(a, g, total, input_precision=PRECISION)
            sums += tl.sum(g.to(tl.float32), 0)
        spot = weight + module * inner * outputs + k.to(tl.int64)[:, None] * outputs + out[None, :]
        tl.store(spot, total.to(weight.dtype.element_ty), mask=inside[:, None] & there[None, :])
        if block == 0:
            tl.store(bias + module * outputs + out, sums.to(bias.dtype.element_ty), mask=there)
