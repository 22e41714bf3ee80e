// The model of this folder in the browser: ONNX models by onnxruntime-web, no service. It is the page's `backend`; its
// methods and answers are those of the service.
'use strict';
globalThis.backend = (() => {
  const MASK = '[mask]', TYPES = {F32: Float32Array, I32: Int32Array, U8: Uint8Array, BOOL: Uint8Array};
  const bytes = async name => {
    const response = await fetch(name, {cache: 'no-cache'});  // another export may be at this address now
    if (!response.ok) throw new Error(`${name} cannot be read (${response.status}); serve the whole folder.`);
    return new Uint8Array(await response.arrayBuffer());
  };
  const kept = (cache, key, make) => cache[key] ??= make().catch(e => { delete cache[key]; throw e; });  // not a failure: the server may come back
  const once = make => { const cache = {}; return () => kept(cache, 'made', make); };
  const named = once(async () => JSON.parse(new TextDecoder().decode(await bytes('manifest.json'))));
  const params = once(() => bytes('params.safetensors'));
  function arrays(file) {  // {name: {dims, type, data}} of a safetensors file
    const start = 8 + Number(new DataView(file.buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(file.subarray(8, start)));
    return Object.fromEntries(Object.entries(header).filter(([key]) => key !== '__metadata__').map(([key, x]) => [key, {
      dims: x.shape, type: x.dtype, data: new TYPES[x.dtype](file.slice(start + x.data_offsets[0], start + x.data_offsets[1]).buffer)}]));
  }
  const targetSets = once(async () => arrays(await bytes('target_sets.safetensors')));
  const scaleOf = async temperature => Math.min(Math.exp(arrays(await params())[`log_scale_${temperature}`]?.data[0] ?? 0), 100);

  // SentencePiece, unigram: reads tokenizer.model, a protocol buffer.
  function fields(file) {  // [[number, value], …]: bytes, or a number
    const result = [];
    let i = 0;
    const varint = () => { let x = 0, shift = 1; for (;;) { const b = file[i++]; x += (b & 127) * shift; if (b < 128) return x; shift *= 128; } };
    while (i < file.length) {
      const key = varint(), wire = key & 7;
      if (wire === 0) result.push([key >> 3, varint()]);
      else if (wire === 5) { result.push([key >> 3, new DataView(file.buffer, file.byteOffset + i).getFloat32(0, true)]); i += 4; }
      else if (wire === 1) i += 8;
      else { const n = varint(); result.push([key >> 3, file.subarray(i, i + n)]); i += n; }
    }
    return result;
  }
  function tokenizerOf(file) {
    const text = new TextDecoder(), utf8 = new TextEncoder(), pieces = [], scores = new Map();
    let charsmap, unknown, longest = 0, least = Infinity;
    for (const [number, value] of fields(file)) {
      if (number === 3) charsmap = fields(value).find(([n]) => n === 2)?.[1];
      if (number !== 1) continue;
      const entry = Object.fromEntries(fields(value)), piece = text.decode(entry[1]), type = entry[3] ?? 1;
      if (type === 2) unknown = pieces.length;
      if (type === 1) {
        scores.set(piece, [pieces.length, entry[2] ?? 0]);
        longest = Math.max(longest, [...piece].length);
        least = Math.min(least, entry[2] ?? 0);
      }
      pieces.push(piece);
    }
    const map = charsmap?.slice(), size = map ? new DataView(map.buffer).getUint32(0, true) : 0;
    const trie = map ? new Uint32Array(map.slice(4, 4 + size).buffer) : null, strings = map?.subarray(4 + size);
    const next = unit => (unit >>> 10) << ((unit & 512) >>> 6);
    function prefix(input, at) {  // [normalized start of the input, its bytes]: the longest rule, or one character
      let node = trie ? next(trie[0]) : 0, found = null;
      for (let i = at; trie && i < input.length; i++) {
        const unit = trie[node ^= input[i]];
        if ((unit & 0x800000ff) >>> 0 !== input[i]) break;
        node ^= next(unit);
        if (unit >>> 8 & 1) found = [trie[node] & 0x7fffffff, i + 1 - at];
      }
      if (found) return [text.decode(strings.subarray(found[0], strings.indexOf(0, found[0]))), found[1]];
      const n = input[at] < 128 ? 1 : input[at] < 224 ? 2 : input[at] < 240 ? 3 : 4;
      return [text.decode(input.subarray(at, at + n)), n];
    }
    function normalize(string) {
      const input = utf8.encode(string.toWellFormed?.() ?? string);
      let result = '', space = true;
      for (let at = 0; at < input.length;) {
        let [part, n] = prefix(input, at);
        at += n;
        if (space) part = part.replace(/^ +/, '');
        if (part) { result += part; space = part.endsWith(' '); }
      }
      return result.trim() && ('▁' + result.replaceAll(' ', '▁')).replace(/▁+$/, '');
    }
    function encode(string) {
      const chars = [...normalize(string)], best = [{score: 0}];
      const put = (end, score, start, id) => { if (!best[end] || score > best[end].score) best[end] = {score, start, id}; };
      for (let start = 0; start < chars.length; start++) {
        let single = false;
        for (let n = 1, piece = ''; n <= longest && start + n <= chars.length; n++) {
          const known = scores.get(piece += chars[start + n - 1]);
          if (!known) continue;
          single ||= n === 1;
          put(start + n, Math.fround(known[1] + best[start].score), start, known[0]);
        }
        if (!single) put(start + 1, Math.fround(Math.fround(least - 10) + best[start].score), start, unknown);
      }
      const ids = [];
      for (let end = chars.length; end > 0; end = best[end].start) if (best[end].id !== unknown || ids.at(-1) !== unknown) ids.push(best[end].id);
      return ids.reverse();
    }
    return {encode, pieces, unknown, decode: ids => ids.map(i => i === unknown ? '?' : pieces[i]).join('').replaceAll('▁', ' ').replace(/^ /, '')};
  }
  const tokenizer = once(async () => {
    const entry = (await named()).tokenizer;
    if (entry.type !== 'sentencepiece') throw new Error(`This page cannot tokenize texts with CLIP's vocabulary; choose a task without texts.`);
    return tokenizerOf(await bytes(entry.file));
  });
  const clipPieces = once(async () => JSON.parse(new TextDecoder().decode(await bytes((await named()).tokenizer.pieces))));
  function pattern(string) {  // of Python, whose classes are those of Unicode
    const w = '[\\p{L}\\p{N}_]', classes = {w, d: '\\p{Nd}', b: `(?:(?<!${w})(?=${w})|(?<=${w})(?!${w}))`};
    return new RegExp(string.replace(/\\([wdb])/g, (_, name) => classes[name]), 'gu');
  }
  const decoded = async (ids, withUnknown = false) => {
    const {type, eot, special} = (await named()).tokenizer, end = ids.indexOf(eot);
    const words = (unknown = -1) => (end < 0 ? ids : ids.slice(0, end)).filter(i => !special.includes(i) || withUnknown && i === unknown);
    if (type === 'clip') {  // its pieces are bytes, as hexadecimal digits
      const pieces = await clipPieces(), file = words().map(i => pieces[i]).join('').match(/../g) ?? [];
      const text = new TextDecoder('utf-8', {ignoreBOM: true}).decode(Uint8Array.from(file, x => parseInt(x, 16))).trim();
      return (await named()).tokenizer.surplus_spaces.reduce((text, spaces) => text.replace(pattern(spaces), ''), text);
    }
    const {unknown, decode} = await tokenizer();
    return decode(words(unknown));
  };
  const rowOf = (row, position) => ({
    text: {dims: [1, row.length], data: Int32Array.from(row)}, text_valid: {dims: [1, row.length], type: 'BOOL', data: new Uint8Array(row.length).fill(1)},
    ...(position && {position: {dims: [1, position.length], data: Int32Array.from(position)}})});
  async function tokens(text, length) {
    const row = [...(await tokenizer()).encode(text), (await named()).tokenizer.eot];
    if (row.length > length) throw new Error(`“${text.slice(0, 40)}” has ${row.length} tokens with the end token, but the model reads at most ${length}; shorten it.`);
    return rowOf(row);
  }
  async function filled(entry, texts) {  // a template, truncated as in training
    const {spe, eot} = (await named()).tokenizer, {encode} = await tokenizer(), markers = {'<spe>': spe, '<eot>': eot};
    const ids = entry.template_parts.map(part => Array.isArray(part) ? [] : part in markers ? [markers[part]] : encode(part));
    const columns = entry.template_parts.flatMap((part, i) => Array.isArray(part) ? [i] : []);
    let budget = entry.max_len - ids.flat().length;
    for (let left = columns.length; left; left--) {
      const i = columns[left - 1], [column, filter] = entry.template_parts[i];
      const text = filter === 'no_stop' ? texts[column].replace(/(?<=[\p{L}\p{N}]|\s)\.\s*$/u, '') : texts[column];
      ids[i] = encode(text).slice(0, Math.floor(budget / left));
      budget -= ids[i].length;
    }
    const row = ids.flat();
    return rowOf(row, [row.indexOf(spe)]);
  }
  async function masked(entry, text) {
    const {spe, eot} = (await named()).tokenizer, {encode} = await tokenizer(), row = [], position = [];
    text.split(MASK).forEach((part, i) => {
      if (i) { position.push(row.length); row.push(spe); }
      row.push(...encode(part));
    });
    if (row.push(eot) > entry.max_len) throw new Error(`The text has ${row.length} tokens, but the model reads at most ${entry.max_len}; shorten it.`);
    return rowOf(row, position);
  }

  // Pixels: resized and cropped as in evaluation, like Pillow's bicubic filter.
  function resized(source, width, height, target) {  // RGB along the first axis of [height, width]; returns [target, …]
    const scale = height / target, support = 2 * Math.max(scale, 1), result = new Uint8ClampedArray(target * width * 3);
    const cubic = x => (x = Math.abs(x)) < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-.5 * x + 2.5) * x - 4) * x + 2 : 0;
    for (let y = 0; y < target; y++) {
      const center = (y + .5) * scale, low = Math.max(0, Math.trunc(center - support + .5)), high = Math.min(height, Math.trunc(center + support + .5));
      const weights = Array.from({length: high - low}, (_, i) => cubic((low + i - center + .5) / Math.max(scale, 1)));
      const total = weights.reduce((a, b) => a + b);
      for (let x = 0; x < width * 3; x++) {
        let sum = 0;
        for (let i = low; i < high; i++) sum += weights[i - low] * source[i * width * 3 + x];
        result[y * width * 3 + x] = Math.floor(sum / total + .5);
      }
    }
    return result;
  }
  const transposed = (a, width, height) => a.map((_, i) => a[((i / 3 | 0) % height * width + (i / 3 / height | 0)) * 3 + i % 3]);
  async function imagePixels(blob, entry) {
    const {image_size: size, channels} = (await named()).model;
    const bitmap = await createImageBitmap(blob, {colorSpaceConversion: 'none'});  // no color profile is applied in training
    let {width, height} = bitmap;
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext('2d', {willReadFrequently: true});
    context.fillStyle = '#fff';
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    const rgba = context.getImageData(0, 0, width, height).data;
    let rgb = new Uint8ClampedArray(width * height * 3);
    for (let i = 0; i < rgb.length; i += 3) for (let c = 0; c < 3; c++) rgb[i + c] = rgba[i / 3 * 4 + c];  // `filter` takes twenty times as long
    const short = entry.crop === 'random_resized_crop' ? Math.floor(256 * size / 224) : size, side = Math.min(width, height);
    if (side !== short) {
      const [w, h] = [width, height].map(x => Math.floor(short * x / side));
      rgb = transposed(resized(transposed(rgb, width, height), height, width, w), height, w);
      rgb = resized(rgb, w, height, h);
      [width, height] = [w, h];
    }
    const [left, top] = [width - size, height - size].map(x => x % 4 === 3 ? (x + 1) / 2 : x >> 1);  // half, rounded to even
    const data = new Uint8Array(size * size * channels);
    for (let i = 0; i < size * size; i++) {
      const at = ((top + (i / size | 0)) * width + left + i % size) * 3;
      if (channels === 1) data[i] = (rgb[at] * 19595 + rgb[at + 1] * 38470 + rgb[at + 2] * 7471 + 32768) >> 16;
      else data.set(rgb.subarray(at, at + 3), 3 * i);
    }
    return {dims: [1, 1, size, size, channels], data};
  }
  const row = (x, i) => { const n = x.data.length / x.dims[0]; return {...x, dims: [1, ...x.dims.slice(1)], data: x.data.slice(i * n, (i + 1) * n)}; };
  const examples = once(async () => {  // distinct images and videos, and a text by task, as the service lists them
    const stored = arrays(await bytes('examples.safetensors')), manifest = await named(), list = [], texts = {}, seen = new Set();
    for (const [task, answers] of Object.entries(manifest.examples)) {
      const pixels = stored[`${task}/pixels`], text = stored[`${task}/text`];
      if (text) texts[task] = await decoded([...row(text, 0).data], true);
      for (const [i, answer] of pixels ? answers.entries() : []) {
        const x = row(pixels, i), key = `${x.dims}:${x.data}`;
        if (seen.has(key)) continue;
        seen.add(key);
        list.push({index: list.length, task, answer, num_frames: pixels.dims[1], pixels: x});
      }
    }
    return {list, texts};
  });

  // Programs.
  const sessions = {};
  async function run(task, program, inputs) {
    const manifest = await named(), entry = manifest.tasks[task].programs[program], {file, outputs, reason} = entry.onnx;
    if (reason) throw new Error(`${task}, ${program} has no ONNX model: ${reason}.`);
    Object.assign(ort.env, {logLevel: 'error'}).wasm.numThreads = 1;  // threads need headers that a static server lacks
    const session = await kept(sessions, file, async () => ort.InferenceSession.create(
      await bytes(file), {logSeverityLevel: 3, externalData: [{path: 'params.safetensors', data: await params()}]}));
    const given = {...inputs};
    if ('targets' in entry.inputs) given.targets ??= (await targetSets())[manifest.tasks[task].target_set];
    const kinds = {Float32Array: 'float32', Int32Array: 'int32', Uint8Array: 'uint8'};
    const feeds = Object.fromEntries(session.inputNames.map(name => {
      const {data, dims, type} = given[name];
      return [name, new ort.Tensor(type === 'BOOL' ? 'bool' : kinds[data.constructor.name], data, dims)];
    }));
    const result = await session.run(feeds);
    return Object.fromEntries(outputs.map((name, i) => {
      const {data, dims, type} = result[session.outputNames[i]];
      return [name, {data, dims, ...(type === 'bool' && {type: 'BOOL'})}];
    }));
  }
  const cacheOf = out => Object.fromEntries(Object.entries(out).filter(([name]) => name.startsWith('cache_')));
  function chosen(cache, axes, rows) {  // hypotheses along the batch axis of every array
    return Object.fromEntries(Object.entries(cache).map(([name, x]) => {
      const axis = axes[name.slice(6)], inner = x.dims.slice(axis + 1).reduce((a, b) => a * b, 1), count = x.dims[axis];
      const outer = x.data.length / inner / count, data = new x.data.constructor(outer * rows.length * inner);
      for (let o = 0; o < outer; o++) rows.forEach((r, i) => data.set(x.data.subarray((o * count + r) * inner, (o * count + r + 1) * inner), (o * rows.length + i) * inner));
      return [name, {...x, dims: x.dims.with(axis, rows.length), data}];
    }));
  }
  const turn = () => new Promise(resolve => setTimeout(resolve));  // the page draws, and may abort
  async function* search(task, pixels, beams, penalty) {  // yields the tokens of the best hypothesis so far, as `caption`
    const manifest = await named(), {max_len: n, programs} = manifest.tasks[task], {eot} = manifest.tokenizer, axes = programs.step.onnx.cache_axes;
    let cache = chosen(cacheOf(await run(task, 'prefill', {pixels})), axes, Array(beams).fill(0));
    let rows = Array.from({length: beams}, (_, i) => ({score: i ? -Infinity : 0, tokens: [], done: false}));
    for (let t = 0; t < n && !rows.every(r => r.done); t++) {
      await turn();
      const word = {dims: [beams], data: Int32Array.from(rows, r => r.tokens.at(-1) ?? eot)};
      const out = await run(task, 'step', {...cache, word, t: {dims: [], data: Int32Array.of(t)}}), V = out.log_p.dims[1], sums = [];
      for (const [parent, r] of rows.entries()) {
        for (let w = 0; w < V; w++) {
          const log_p = r.done ? (w === eot ? 0 : -Infinity) : out.log_p.data[parent * V + w];
          sums.push({score: Math.fround(r.score + log_p), parent, w});
        }
      }
      const best = sums.sort((a, b) => b.score - a.score || 0).slice(0, beams);
      rows = best.map(({score, parent, w}) => ({
        score, tokens: [...rows[parent].tokens, w], done: rows[parent].done || w === eot || score === -Infinity}));
      cache = chosen(cacheOf(out), axes, best.map(b => b.parent));
      yield rows[0].tokens;
    }
    const final = r => r.score / ((r.tokens.filter(w => w !== eot).length + 1) ** penalty);
    rows.sort((a, b) => final(b) - final(a) || 0);
    yield rows[0].tokens;
  }

  // Answers.
  const features = {};
  async function textFeatures(task, names, signal) {
    const manifest = await named(), entry = manifest.tasks[task];
    const length = entry.target_set ? manifest.target_sets[entry.target_set].max_len : entry.max_len;
    const rows = [];
    for (const name of names) {
      const key = `${entry.programs.encode_text.file} ${length} ${name}`;
      if (!features[key]) await turn();
      signal?.throwIfAborted();
      rows.push(await kept(features, key, async () => (await run(task, 'encode_text', await tokens(name, length))).features.data));
    }
    return rows;
  }
  async function inputsOf(body) {
    const entry = (await named()).tasks[body.task];
    if (body.video) throw new Error('This page cannot read video files; choose an example or use the service.');
    const inputs = entry.template_parts.length && entry.readout !== 'masked' ? await filled(entry, body.texts) : {};
    if (body.image) inputs.pixels = await imagePixels(body.image, entry);
    if (body.example !== undefined) inputs.pixels = (await examples()).list[body.example].pixels;
    return inputs;
  }
  const ranked = (values, top) => [...values].map((p, i) => [p, i]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).slice(0, top);
  const conditions = async (task, text) => { const e = (await named()).tasks[task]; return [...e.input_conditions, ...(text ? [text] : [])]; };
  async function* caption(body, signal) {
    const entry = (await named()).tasks[body.task], {pixels} = await inputsOf(body);
    let ids = [], stopped = () => signal?.throwIfAborted();
    for await (ids of search(body.task, pixels, 1, 0)) {
      stopped();
      yield ['words', {text: await decoded(ids)}];
    }
    for await (ids of search(body.task, pixels, entry.beam_size, entry.length_penalty)) stopped();
    yield ['caption', {task: body.task, text: await decoded(ids), tokens: ids, conditions: await conditions(body.task)}];
  }
  return {
    caption,
    async model() {
      const manifest = await named(), {model, trained, provenance} = manifest, {list, texts} = await examples();
      const runs = (entry, ...names) => names.every(name => entry.programs[name]?.onnx && !entry.programs[name].onnx.reason);
      const does = entry => [...(runs(entry, 'encode') && ['cls', 'slot'].includes(entry.readout) ? ['classify'] : []),
        ...(runs(entry, 'prefill', 'step') ? ['caption'] : []), ...(runs(entry, 'classify') && entry.readout === 'masked' ? ['fill'] : [])];
      return {
        name: provenance.name, step: provenance.step, parameters: model.parameters, num_layers: model.num_layers, width: model.width,
        image_size: model.image_size, channels: model.channels, dark: model.pixel_mean[0] < .5, router: trained.router,
        num_experts: trained.num_experts ?? 0, moe_layers: trained.moe_layers, mixtures: manifest.mixtures,
        tasks: Object.fromEntries(Object.entries(manifest.tasks).map(([name, e]) => [name, {
          type: e.type, does: does(e), input: e.media ?? ['text', 'image'][e.num_frames] ?? 'video', num_frames: e.num_frames,
          columns: e.template_parts.filter(Array.isArray).map(([column]) => column), template: e.template, target_set: e.target_set,
          example_text: texts[name] ?? '',
          takes_names: runs(e, 'encode', 'encode_text'), conditions: e.conditions}])),
        target_sets: manifest.target_sets, gallery: {size: 0, searchers: [], candidates: [], items: []},
        examples: list.map(({pixels, ...e}) => e), limits: {max_body_bytes: 2 ** 26}};
    },
    async media(path) {
      const {pixels: {dims: [, , size, , channels], data}} = (await examples()).list[path.split('/')[1]], scale = Math.max(1, Math.ceil(96 / size));
      const canvas = new OffscreenCanvas(size * scale, size * scale), context = canvas.getContext('2d');
      for (let i = 0; i < size * size; i++) {
        const [r, g, b] = [0, 1, 2].map(c => data[i * channels + Math.min(c, channels - 1)]);
        context.fillStyle = `rgb(${r} ${g} ${b})`;
        context.fillRect(i % size * scale, (i / size | 0) * scale, scale, scale);
      }
      return URL.createObjectURL(await canvas.convertToBlob());
    },
    async classify(body, signal) {
      const manifest = await named(), entry = manifest.tasks[body.task], inputs = await inputsOf(body);
      if (!body.names?.length) {
        const set = manifest.target_sets[entry.target_set], {data} = (await run(body.task, 'classify', inputs)).log_p;
        return {task: body.task, answers: ranked(data, body.top ?? 5).map(([p, i]) => ({text: set.texts[i], probability: Math.exp(p)})),
          conditions: await conditions(body.task, set.condition)};
      }
      const {data} = (await run(body.task, 'encode', inputs)).features, names = await textFeatures(body.task, body.names, signal);
      const scale = await scaleOf(entry.temperature), logits = names.map(x => scale * x.reduce((sum, v, i) => sum + v * data[i], 0));
      const largest = Math.max(...logits), weights = logits.map(x => Math.exp(x - largest)), total = weights.reduce((a, b) => a + b);
      return {task: body.task, answers: ranked(weights, body.top ?? 5).map(([w, i]) => ({text: body.names[i], probability: w / total})),
        conditions: await conditions(body.task, entry.text_condition)};
    },
    async fill(body) {
      const {pieces} = await tokenizer(), {special} = (await named()).tokenizer;
      const {dims: [, m, V], data} = (await run(body.task, 'classify', await masked((await named()).tasks[body.task], body.text))).log_p;
      const word = i => pieces[i].startsWith('▁') ? pieces[i].slice(1) || pieces[i] : /^[\p{L}\p{N}]+$/u.test(pieces[i]) && !special.includes(i) ? `##${pieces[i]}` : pieces[i];
      return {task: body.task, conditions: await conditions(body.task), masks: Array.from({length: m}, (_, k) =>
        ranked(data.subarray(k * V, (k + 1) * V), body.top ?? 5).map(([p, i]) => ({text: word(i), probability: Math.exp(p)})))};
    },
    async search() { throw new Error('This page has no gallery; use the service.'); },
    tokenize: async text => (await tokenizer()).encode(text),
  };
})();
