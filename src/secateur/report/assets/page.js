"use strict";
// Tables that sort, and the pictures of masks. The page is complete without either.
(() => {
  const $ = (id) => document.getElementById(id);
  const XML = "http://www.w3.org/2000/svg";
  const make = (name, attributes = {}, words = null, parent = null) => {
    const element = document.createElementNS(XML, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (words !== null) element.textContent = words;
    if (parent) parent.append(element);
    return element;
  };
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;
  const count = (value) => value.toLocaleString("en");

  // Tables

  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    return text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  const sort = (table, column) => {
    const heading = table.tHead.rows[0].cells[column];
    const descending = heading.getAttribute("aria-sort") === "ascending";
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : descending ? compare(b, a) : compare(a, b)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => cell.firstElementChild.addEventListener("click", () => sort(table, column)));
  }

  // Masks

  if (!$("data")) return;
  const { matrices } = JSON.parse($("data").textContent);
  const drawable = matrices.filter((matrix) => matrix.counts);
  const select = $("matrix");
  let current = 0, view = "share", cell = null, shown = null;

  // Four planes of bytes, least significant first: cells, lowest and highest column, lowest and highest row.
  const decode = async (matrix) => {
    const bytes = Uint8Array.from(atob(matrix.counts), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planes = new Uint8Array(await new Response(stream).arrayBuffer());
    const length = planes.length / 4;
    const counts = Float64Array.from({ length }, (_, i) => planes[i] + 256 * (planes[length + i] + 256 * (planes[2 * length + i] + 256 * planes[3 * length + i])));
    const [height, width] = matrix.shape, side = matrix.side;
    const down = Math.ceil(height / side), across = Math.ceil(width / side);
    let at = 0;
    const take = (n) => counts.subarray(at, (at += n));
    const lines = (n) => ({ low: take(n), high: take(n) });
    return { ...matrix, height, width, down, across, kept: take(down * across), columns_: lines(across), rows_: lines(down) };
  };
  const span = (position, side, length) => Math.min(side, length - position * side);

  const colour = (name) => {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const mix = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);
  const DEVIATIONS = 6;
  const departure = (mask, kept, weights) => {
    const density = 1 - mask.sparsity, deviation = Math.sqrt(weights * density * (1 - density));
    return deviation > 0 ? (kept - weights * density) / deviation : 0;
  };
  const bitmap = (mask) => {
    const canvas = document.createElement("canvas");
    canvas.width = mask.across;
    canvas.height = mask.down;
    const context = canvas.getContext("2d"), image = context.createImageData(mask.across, mask.down);
    const [gone, kept, fewer, even, more] = ["gone", "kept", "fewer", "even", "more"].map(colour);
    for (let i = 0; i < mask.kept.length; i++) {
      const row = Math.floor(i / mask.across), weights = span(row, mask.side, mask.height) * span(i % mask.across, mask.side, mask.width);
      let value;
      if (view === "share") value = mix(gone, kept, mask.kept[i] / weights);
      else {
        const z = Math.max(-1, Math.min(1, departure(mask, mask.kept[i], weights) / DEVIATIONS));
        value = z < 0 ? mix(even, fewer, -z) : mix(even, more, z);
      }
      image.data.set([...value, 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
    return canvas.toDataURL();
  };

  // A side of the picture: mean sparsity of the lines in each cell, and the band between the extremes of single lines.
  const profile = (mask, cells, length, others, kept, extremes) => {
    const mean = [], low = [], high = [], edges = [0];
    for (let i = 0; i < cells; i++) {
      const lines = span(i, mask.side, length);
      mean.push(1 - kept(i) / (lines * others));
      low.push(extremes.low[i] / others);
      high.push(extremes.high[i] / others);
      edges.push((i * mask.side + lines) / length);
    }
    return { mean, low, high, edges };
  };
  const steps = (values, edges, along, up) => values.map((value, i) => `${along(edges[i])} ${up(value)} ${along(edges[i + 1])} ${up(value)}`);
  const drawProfile = (parent, side, along, up, flip) => {
    const point = (text) => { // "x y x y" in the profile's own axes
      const numbers = text.split(" ").map((number) => Number(number).toFixed(2));
      return flip ? `${numbers[1]} ${numbers[0]} ${numbers[3]} ${numbers[2]}` : numbers.join(" ");
    };
    const path = (values) => steps(values, side.edges, along, up).map(point);
    const back = path(side.low).map((text) => { const [a, b, c, d] = text.split(" "); return `${c} ${d} ${a} ${b}`; }).reverse();
    make("path", { class: "band", d: `M${path(side.high).join("L")}L${back.join("L")}Z` }, null, parent);
    make("path", { class: "line", d: `M${path(side.mean).join("L")}` }, null, parent);
  };

  const roomIn = (id) => $(id).clientWidth || 684; // a page that is not laid out, while it is printed, has no width
  const LEFT = 46, TOP = 74, GAP = 12, PROFILE = 52;
  const drawPicture = () => {
    const mask = shown, right = innerWidth < 480 ? 40 : 70, room = roomIn("mask") - LEFT - GAP - right - 4;
    const scale = Math.min(Math.min(room, 680) / mask.width, Math.max(260, Math.min(640, innerHeight * 0.85)) / mask.height);
    const width = Math.max(40, mask.width * scale), height = Math.max(40, mask.height * scale);
    const svg = make("svg", { width: LEFT + width + GAP + right, height: TOP + height + 34, role: "img" });
    svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
    svg.setAttribute("aria-label", `Mask of ${mask.name}: ${percent(mask.sparsity, 2)} zeros; columns vary by ${percent(mask.columns.excess)} and rows by ${percent(mask.rows.excess)} beyond chance.`);
    make("image", { x: LEFT, y: TOP, width, height, href: bitmap(mask), preserveAspectRatio: "none", style: "image-rendering: pixelated" }, null, svg);
    make("rect", { class: "frame", x: LEFT, y: TOP, width, height }, null, svg);
    const across = (share) => LEFT + share * width, downwards = (share) => TOP + share * height;
    const up = (share) => TOP - GAP - share * PROFILE, outwards = (share) => LEFT + width + GAP + share * (right - 14);
    const total = (n, index) => { let sum = 0; for (let i = 0; i < n; i++) sum += mask.kept[index(i)]; return sum; };
    drawProfile(svg, profile(mask, mask.across, mask.width, mask.height, (c) => total(mask.down, (r) => r * mask.across + c), mask.columns_), across, up, false);
    drawProfile(svg, profile(mask, mask.down, mask.height, mask.width, (r) => total(mask.across, (c) => r * mask.across + c), mask.rows_), downwards, outwards, true);
    for (const share of [0, 1]) {
      make("text", { class: "axis", x: LEFT - 6, y: up(share) + 4, "text-anchor": "end" }, percent(share, 0), svg);
      make("text", { class: "axis", x: outwards(share), y: TOP - 8, "text-anchor": share ? "end" : "start", dx: share ? 12 : 0 }, right < 60 && share ? "" : String(100 * share), svg);
      make("line", { class: "frame", x1: LEFT, x2: LEFT + width, y1: up(share), y2: up(share) }, null, svg);
      make("line", { class: "frame", y1: TOP, y2: TOP + height, x1: outwards(share), x2: outwards(share) }, null, svg);
    }
    make("line", { class: "level", x1: LEFT, x2: LEFT + width, y1: up(mask.sparsity), y2: up(mask.sparsity) }, null, svg);
    make("line", { class: "level", y1: TOP, y2: TOP + height, x1: outwards(mask.sparsity), x2: outwards(mask.sparsity) }, null, svg);
    make("text", { class: "axis", x: LEFT, y: TOP + height + 16 }, "1", svg);
    make("text", { class: "axis", x: LEFT + width, y: TOP + height + 16, "text-anchor": "end" }, count(mask.width), svg);
    if (width > 150) make("text", { class: "axis", x: LEFT + width / 2, y: TOP + height + 16, "text-anchor": "middle" }, "input (column)", svg);
    make("text", { class: "axis", x: LEFT - 6, y: TOP + 10, "text-anchor": "end" }, "1", svg);
    make("text", { class: "axis", x: LEFT - 6, y: TOP + height, "text-anchor": "end" }, count(mask.height), svg);
    if (height > 120) make("text", { class: "axis", "text-anchor": "middle", transform: `translate(${LEFT - 8} ${TOP + height / 2}) rotate(-90)` }, "output (row)", svg);
    const cursor = make("rect", { class: "cursor", visibility: "hidden" }, null, svg);
    $("picture").replaceChildren(svg);
    $("picture").onpointermove = $("picture").onpointerdown = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left - LEFT) / width, y = (event.clientY - box.top - TOP) / height;
      if (x >= 0 && x < 1 && y >= 0 && y < 1) point([Math.floor((y * mask.height) / mask.side), Math.floor((x * mask.width) / mask.side)]);
    };
    const point = (where) => {
      cell = where.map((position, axis) => Math.max(0, Math.min([mask.down, mask.across][axis] - 1, position)));
      const [row, column] = cell, tall = span(row, mask.side, mask.height), broad = span(column, mask.side, mask.width);
      const kept = mask.kept[row * mask.across + column], weights = tall * broad;
      for (const [name, value] of Object.entries({
        x: LEFT + (column * mask.side * width) / mask.width, y: TOP + (row * mask.side * height) / mask.height,
        width: (broad * width) / mask.width, height: (tall * height) / mask.height, visibility: "visible",
      })) cursor.setAttribute(name, value);
      const lines = (name, position, length) => (length === 1 ? `${name} ${count(position + 1)}` : `${name}s ${count(position + 1)} to ${count(position + length)}`);
      const where_ = `${lines("row", row * mask.side, tall)}, ${lines("column", column * mask.side, broad)}`;
      $("reading").textContent = weights === 1
        ? `${where_}: ${kept ? "kept" : "pruned"}`
        : `${where_}: ${count(kept)} of ${count(weights)} kept, ${percent(kept / weights)}; ${departure(mask, kept, weights).toFixed(1)} standard deviations of chance`;
    };
    if (cell) point(cell);
    $("picture").onkeydown = (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      point(cell ? [cell[0] + step[0], cell[1] + step[1]] : [0, 0]);
    };
  };

  const drawScale = () => {
    const labels = view === "share" ? ["0 % kept", "100 %"] : [`−${DEVIATIONS} σ: fewer kept than chance`, `+${DEVIATIONS} σ: more`];
    const bar = document.createElement("span");
    bar.className = `bar ${view}`;
    $("scale").replaceChildren(labels[0], bar, labels[1]);
  };

  const edges = ({ scale, low, high, kept }) => kept.map((_, i) => i).concat(kept.length).map((i) =>
    scale === "linear" ? low + ((high - low) * i) / kept.length : high * 2 ** ((i - kept.length) / 2));
  const decade = (value) => (value === 0 || (Math.abs(value) >= 1e-4 && Math.abs(value) < 1e6) ? String(Number(value.toPrecision(3))) : value.toExponential(0).replace("-", "−"));
  const drawValues = () => {
    const { values, scored } = shown, limits = edges(values);
    const pruned = values.pruned ?? values.kept.map(() => 0);
    const weights = shown.height * shown.width, most = Math.max(...values.kept.map((kept, i) => kept + pruned[i])) || 1;
    const width = Math.min(680, roomIn("values") - 4), height = 170, left = 46, top = 22, room = width - left - 8;
    const svg = make("svg", { width, height: height + 30, viewBox: `0 0 ${width} ${height + 30}`, role: "img" });
    svg.setAttribute("aria-label", scored ? "Histogram of the scores of kept and of pruned weights" : "Histogram of the magnitudes of the kept weights");
    const logarithmic = values.scale === "logarithmic", from = limits[0], to = limits[limits.length - 1];
    const at = (value) => left + room * (logarithmic ? Math.log(value / from) / Math.log(to / from) : (value - from) / (to - from || 1));
    const floor = height - 4, tall = floor - top;
    make("line", { class: "frame", x1: left, x2: left + room, y1: floor, y2: floor }, null, svg);
    values.kept.forEach((kept, i) => {
      const x = at(limits[i]) + 0.5, broad = Math.max(0.5, at(limits[i + 1]) - at(limits[i]) - 1);
      const low = (tall * pruned[i]) / most, high = (tall * kept) / most;
      if (pruned[i]) make("rect", { class: "bar-pruned", x, width: broad, y: floor - low, height: low }, null, svg);
      if (kept) make("rect", { class: "bar-kept", x, width: broad, y: floor - low - high, height: high }, null, svg);
    });
    make("text", { class: "axis", x: left - 6, y: top + 4, "text-anchor": "end" }, percent(most / weights, 1), svg);
    make("text", { class: "axis", x: left - 6, y: floor, "text-anchor": "end" }, "0", svg);
    const ticks = logarithmic ? Array.from({ length: 60 }, (_, i) => 10 ** (i - 40)).filter((tick) => tick >= from && tick <= to) : [from, (from + to) / 2, to];
    for (const tick of ticks) make("text", { class: "axis", x: at(tick), y: height + 14, "text-anchor": "middle" }, decade(tick), svg);
    [["bar-kept", "kept"], ["bar-pruned", "pruned"]].slice(0, scored ? 2 : 1).forEach(([name, words], i) => {
      make("rect", { class: name, x: left + 90 * i, y: 0, width: 11, height: 11 }, null, svg);
      make("text", { class: "axis", x: left + 90 * i + 17, y: 10 }, words, svg);
    });
    $("values-drawn").replaceChildren(svg);
    $("values-caption").textContent = (scored
      ? "Scores of the kept and of the pruned weights of this matrix, as the method ranked them; shares of all weights, stacked."
      : "The run recorded no scores; methods that update weights have none to record. Shown instead: the magnitudes of the weights that this matrix kept.")
      + (logarithmic ? " Two bins to an octave; the lowest one also holds everything below it." : "");
    const table = document.createElement("table"), head = table.createTHead().insertRow();
    for (const words of ["from", "to", "kept", ...(scored ? ["pruned"] : [])]) {
      const heading = document.createElement("th");
      Object.assign(heading, { scope: "col", className: "n", textContent: words });
      head.append(heading);
    }
    const body = table.createTBody();
    values.kept.forEach((kept, i) => {
      const row = body.insertRow();
      const first = logarithmic && i === 0 ? "0" : limits[i].toPrecision(3);
      for (const words of [first, limits[i + 1].toPrecision(3), count(kept), ...(scored ? [count(pruned[i])] : [])]) {
        Object.assign(row.insertCell(), { className: "n", textContent: words });
      }
    });
    $("values-numbers").replaceChildren(table);
  };

  const facts = () => {
    const list = document.createElement("dl");
    list.className = "facts";
    const beyond = (side) => `${percent(side.excess)} beyond chance${side.ratio === null ? "" : `, ratio ${side.ratio.toFixed(2)}`}`;
    const pairs = [
      ["Sparsity", percent(shown.sparsity, 2)],
      ["Columns", beyond(shown.columns)],
      ["Rows", beyond(shown.rows)],
      ["Entirely zero", `${count(shown.columns.empty)} columns, ${count(shown.rows.empty)} rows`],
    ];
    for (const [name, value] of pairs) {
      const group = document.createElement("div");
      group.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
      list.append(group);
    }
    $("mask-facts").replaceChildren(list);
  };

  const show = async (index) => {
    current = (index + drawable.length) % drawable.length;
    const wanted = current, decoded = await decode(drawable[wanted]);
    if (wanted !== current) return;
    shown = decoded;
    cell = null;
    select.value = String(current);
    $("reading").textContent = "Point at a cell, or move with the arrow keys, to read it.";
    const weights = shown.side * shown.side;
    $("mask-caption").textContent = `${shown.name}: ${count(shown.height)} × ${count(shown.width)}. `
      + (shown.side === 1 ? "Every weight is one cell." : `A cell averages ${shown.side} × ${shown.side} = ${count(weights)} weights${shown.height % shown.side || shown.width % shown.side ? ", fewer at the right and lower edges" : ""}.`);
    drawPicture();
    drawScale();
    drawValues();
    facts();
    $("mask").dataset.matrix = shown.name; // tells tests, and scripts, that this matrix is on the page now
  };

  let group = null;
  drawable.forEach((matrix, index) => {
    if (!group || group.label !== `Block ${matrix.block}`) {
      group = document.createElement("optgroup");
      group.label = `Block ${matrix.block}`;
      select.append(group);
    }
    group.append(new Option(`${matrix.block} · ${matrix.label}`, index));
  });
  select.addEventListener("change", () => show(Number(select.value)));
  $("previous").addEventListener("click", () => show(current - 1));
  $("next").addEventListener("click", () => show(current + 1));
  for (const choice of document.getElementsByName("view")) choice.addEventListener("change", () => { view = choice.value; drawPicture(); drawScale(); });
  $("matrices").addEventListener("click", (event) => {
    const row = event.target.closest("tbody th button");
    const index = row ? drawable.findIndex((matrix) => matrix.name === row.dataset.matrix) : -1;
    if (index < 0) return;
    show(index);
    $("masks").scrollIntoView();
    select.focus({ preventScroll: true });
  });
  for (const heading of $("matrices").querySelectorAll("tbody th")) {
    const matrix = drawable.find(({ name }) => name === heading.textContent.trim());
    if (!matrix) continue;
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(...matrix.name.split(".").flatMap((part, i) => (i ? [document.createElement("wbr"), `.${part}`] : [part])));
    button.dataset.matrix = matrix.name;
    heading.replaceChildren(button);
  }

  // A picture by itself has no style sheet: every shape takes its colours along.
  $("save").addEventListener("click", () => {
    const original = $("picture").firstElementChild, copy = original.cloneNode(true);
    const shapes = [...original.querySelectorAll("*")];
    [...copy.querySelectorAll("*")].forEach((shape, i) => {
      const style = getComputedStyle(shapes[i]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size"]) shape.style.setProperty(name, style.getPropertyValue(name));
    });
    copy.setAttribute("xmlns", XML);
    copy.querySelector(".cursor").remove();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
    link.download = `${shown.name}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  const redraw = () => { if (shown) { drawPicture(); drawValues(); } };
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; redraw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => { document.documentElement.dataset.print = ""; redraw(); });
  addEventListener("afterprint", () => { delete document.documentElement.dataset.print; redraw(); });
  $("picker").hidden = false;
  show(0);
})();
