"""How the page of `vltrain preview` looks."""

STYLE = """
:root { color-scheme: light; --learned: #bfe8c8; --masked: #eceef1; --ink: #1c2128; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 24px; background: #f6f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
h2 .id { font-weight: normal; color: #59636e; margin-left: 8px; }
p { margin: 6px 0; }
i { font-style: normal; color: #7d8590; }
i.u { border: 1px dashed #9aa3ad; border-radius: 3px; font-size: 11px; padding: 0 2px; }
.model, .counts { color: #59636e; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 10px; margin: 14px 0; }
.facts div { background: #fff; border: 1px solid #d8dce1; border-radius: 8px; padding: 8px 14px; }
.facts dt { font-size: 12px; color: #59636e; }
.facts dd { margin: 0; font-size: 17px; font-weight: 600; }
.kinds span, .counts .error { border-radius: 6px; padding: 1px 8px; white-space: nowrap; }
.error { background: #ffdfdc; color: #8a1510; }
.warning { background: #fff2c6; color: #6b4a00; }
.findings { list-style: none; margin: 10px 0; padding: 0; }
.findings li { border-radius: 6px; padding: 6px 12px; margin: 4px 0; overflow-wrap: anywhere; }
.legend { background: #fff; border: 1px solid #d8dce1; border-radius: 8px; padding: 8px 14px;
  line-height: 2; }
.sample { background: #fff; border: 1px solid #d8dce1; border-radius: 10px; padding: 16px 20px;
  margin: 18px 0; }
.body { display: flex; gap: 20px; align-items: flex-start; }
.pictures { flex: 0 0 auto; max-width: 40%; }
.pictures:empty { display: none; }
.turns { flex: 1 1 0; min-width: 0; }
.turn { border-left: 3px solid #d8dce1; padding: 2px 0 2px 10px; margin: 0 0 8px;
  overflow-wrap: anywhere; line-height: 1.75; }
.t { background: var(--masked); border-radius: 3px; padding: 1px 1px; margin-right: 1px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; white-space: pre-wrap; }
.t.l { background: var(--learned); }
.t.c { font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; color: #4a4f9c;
  border: 1px solid #b9bce6; padding: 0 3px; }
.chip { background: #dbe7ff; color: #12408f; border-radius: 10px; padding: 1px 10px;
  white-space: nowrap; }
figure { margin: 0 0 14px; max-width: 448px; }
figcaption { font-size: 12.5px; color: #59636e; overflow-wrap: anywhere; }
.picture { position: relative; display: inline-block; line-height: 0; max-width: 100%; }
.picture img { max-width: 100%; height: auto; border: 0; }
.missing { background: #ffdfdc; color: #8a1510; border-radius: 6px; padding: 10px; margin: 0;
  font-size: 13px; }
.box { position: absolute; border: 2px solid var(--colour); box-shadow: 0 0 0 1px #ffffffa0; }
.quad { position: absolute; }
.quad svg { position: absolute; width: 100%; height: 100%; overflow: visible; }
.quad polygon { fill: none; stroke: var(--colour); stroke-width: 2px;
  vector-effect: non-scaling-stroke; }
.label { position: absolute; left: -2px; bottom: 100%; background: var(--colour); color: #fff;
  font-size: 12px; line-height: 1.35; padding: 0 5px; white-space: nowrap; max-width: 220px;
  overflow: hidden; text-overflow: ellipsis; }
.label.in { bottom: auto; top: 0; }
.label.left { left: auto; right: -2px; }
.raw { background: #f6f7f9; border-radius: 6px; padding: 10px; margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
@media (max-width: 800px) { .body { display: block; } .pictures { max-width: none; } }
"""
